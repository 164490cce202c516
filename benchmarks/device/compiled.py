"""Compiled as one graph over a static cache, in CUDA graphs where there are any: the same answer, and how fast."""

from typing import Any

import torch
from torch._dynamo.utils import counters

from ..pairs import compare
from .accuracy import CLOSE
from .graphs import static_step
from .proof import Proof
from .subjects import ordinary, twins
from .ways import kl

LAYERS = 2  # compiling takes seconds a layer


def compiled(proof: Proof) -> None:
    """sdpa first: it is the default. A fixed model that does not compile as one graph breaks a promise."""
    mode = "reduce-overhead" if proof.device.type == "cuda" else "default"
    width, context = proof.sizes.compiled_width, proof.sizes.compiled_context
    for attention in ("sdpa", "eager"):
        if proof.over(f"compiled {attention}"):
            continue
        with proof.row("compiled", attention=attention, mode=mode, width=width, layers=LAYERS, tokens=context) as row:
            torch._dynamo.reset()
            weights = ordinary(width, LAYERS, torch.float16, proof.device)
            steps = []
            for name, model in zip(("fixed", "stock"), twins(weights, attention)[::-1], strict=True):
                steps.append(answers(proof, row, name, model))
            row |= compare(*steps[::-1], proof.device, max(proof.sizes.shortest, 0.1 * proof.left())).as_dict()


def answers(proof: Proof, row: dict[str, Any], name: str, model: Any) -> Any:
    """A compiled step. Puts into the row how far its logits are from those without a compiler."""
    counters.clear()
    take_back, write = static_step(model, row["tokens"])
    compiled_model = torch.compile(model, fullgraph=True, dynamic=False, mode=row["mode"])
    again, write_compiled = static_step(model, row["tokens"], compiled_model)

    def step() -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # the logits of the step before are not needed any more
        again()
        return write_compiled()

    with torch.no_grad():
        take_back()
        plain = write().float().cpu()
        for _ in range(3):  # compiled, warmed up, recorded
            found = step().float().cpu()
    row[f"{name}_kl"] = kl(plain, found)
    row[f"{name}_graph_skips"] = int(counters["inductor"]["cudagraph_skips"])
    if name == "fixed":
        value = row["fixed_kl"]
        proof.promise(
            value is not None and value < CLOSE, f"Compiled with {row['attention']}, a fixed model answers otherwise."
        )
    return step
