"""Prompts and single tokens, stock and fixed in pairs, and what memory a prompt takes."""

from typing import Any

import torch

from .. import workloads
from ..cells import peak_bytes
from ..models import DTYPES
from ..pairs import compare
from .graphs import graphed, static_step
from .proof import Proof, free_memory
from .subjects import ordinary, twins

#: Peak memory of fixed over stock's that the tests of the counts allow.
MOST_MEMORY = 1.02


def decode(proof: Proof) -> None:
    """One token after a context; also replayed as a CUDA graph, which leaves the host's time out."""
    timed(proof, "decode", proof.sizes.contexts, proof.sizes.decode_layers)


def prompts(proof: Proof) -> None:
    """A whole prompt into a new cache."""
    timed(proof, "prompts", proof.sizes.prompts, proof.sizes.prompt_layers)


def timed(proof: Proof, section: str, sizes: tuple[int, ...], layers: int) -> None:
    """Every width, attention and size, float16 first. The time left is shared among the rows that are left."""
    groups = [(dtype, width) for dtype in ("fp16", "bf16") for width in proof.sizes.widths]
    rows_left = len(groups) * 2 * len(sizes)
    for dtype, width in groups:
        weights = None
        for attention, size in ((attention, size) for attention in ("eager", "sdpa") for size in sizes):
            rows_left -= 1
            if proof.over(f"{section} {width} {dtype} {attention} {size:,}"):
                continue
            case = {"width": width, "dtype": dtype, "attention": attention, "tokens": size, "layers": layers}
            with proof.row(section, **case) as row:
                weights = weights or ordinary(width, layers, DTYPES[dtype], proof.device)
                budget = max(proof.sizes.shortest, 0.4 * proof.left() / (rows_left + 1))
                measure(proof, section, row, twins(weights, attention), budget)
            free_memory(proof.device)


def measure(proof: Proof, section: str, row: dict[str, Any], models: tuple[Any, Any], budget: float) -> None:
    """Puts the ratio of a row into it, and that of CUDA graphs for a single token."""
    if section == "prompts":
        steps = [workloads.prefill(model, row["tokens"], 1) for model in models]
        row |= compare(*steps, proof.device, budget).as_dict()
        return
    steps = [workloads.decode(model, row["tokens"], 1) for model in models]
    row |= compare(*steps, proof.device, budget / 2).as_dict()
    if proof.device.type != "cuda":
        for model in models:  # the step that a graph would hold
            with torch.no_grad():
                for each in static_step(model, row["tokens"]):
                    each()
        return
    graphs = [graphed(model, row["tokens"]) for model in models]
    row["graph"] = compare(*graphs, proof.device, budget / 2).as_dict()


def memory(proof: Proof) -> None:
    """Peak of a prompt above what was there before it."""
    for width in proof.sizes.launch_widths:
        weights = ordinary(width, 2, torch.float16, proof.device)
        for attention in ("eager", "sdpa"):
            if proof.over(f"memory {width} {attention}"):
                continue
            with proof.row("memory", width=width, attention=attention, tokens=proof.sizes.memory_tokens) as row:
                steps = [workloads.prefill(model, row["tokens"], 1) for model in twins(weights, attention)]
                if proof.device.type == "cuda":  # libraries keep workspaces from their first call on
                    with torch.no_grad():
                        for step in steps:
                            step()
                before, after = (peak_bytes(step, proof.device) for step in steps)
                row |= {"stock_bytes": before, "fixed_bytes": after, "ratio": after / before}
                proof.promise(
                    row["ratio"] <= MOST_MEMORY,
                    f"A prompt of {row['tokens']:,} tokens at {width} in {attention} takes {row['ratio']:.3f} of "
                    f"stock's memory, not at most {MOST_MEMORY}.",
                )
