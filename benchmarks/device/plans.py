"""Plans made on the device are those made on a CPU, and what making them takes."""

import copy
import statistics
import time
from typing import Any

import torch

import qwen2_fp16_fix
from qwen2_fp16_fix.patches import planning

from ..models import build
from .proof import Proof, wait_for
from .subjects import named, stressed

TIMES = 3


def plans(proof: Proof) -> None:
    """Exponents, what attention and MLP scale, the pairs in two parts and the centre of the keys: all the same."""
    subjects = {named(kinds): stressed(kinds) for kinds in proof.sizes.kinds}
    subjects[f"{proof.sizes.plan_width} random"] = build(proof.sizes.plan_width, 2, torch.float16)
    for name, base in subjects.items():
        if proof.over(f"plans of {name}"):
            continue
        with proof.row("plans", weights=name) as row:
            here = qwen2_fp16_fix.fix(copy.deepcopy(base).half())
            there = qwen2_fp16_fix.fix(copy.deepcopy(base).half().to(proof.device))
            row |= {"cpu": [written(layer) for layer in here.model.layers]}
            row |= {"device": [written(layer) for layer in there.model.layers]}
            row["same"] = row["cpu"] == row["device"]
            row["same_centres"] = all(map(same_centre, here.model.layers, there.model.layers))
            proof.promise(row["same"], f"The plans of {name} differ between the device and a CPU.")
            proof.promise(row["same_centres"], f"The centres of the keys of {name} differ from those made on a CPU.")


def written(layer: Any) -> dict[str, Any]:
    """A layer's plan as plain data."""
    attention, plan = layer.self_attn, layer.plan
    split = None if attention.centre is None else attention.centre.split
    return {
        "exponents": None if plan is None else list(plan.exponents),
        "ranges": list(attention.ranges),
        "wide": [layer.input_layernorm.is_wide, layer.post_attention_layernorm.is_wide],
        "pairs": None if split is None else split.channels.flatten().tolist(),
    }


def same_centre(one: Any, other: Any) -> bool:
    """Whether two layers take the same off their keys, bit for bit."""
    shifts = [layer.self_attn.shift for layer in (one, other)]
    if None in shifts:
        return shifts == [None, None]
    return torch.equal(shifts[0].cpu(), shifts[1].cpu())


def planning_time(proof: Proof) -> None:
    """Seconds of a layer's plan, as it is made at load, and of a copy of the same bytes beside it."""
    for dtype in (torch.float16, torch.bfloat16):
        if proof.over(f"planning in {dtype}"):
            continue
        name = str(dtype).removeprefix("torch.")
        with proof.row("planning", width=proof.sizes.plan_width, dtype=name) as row:
            model = build(proof.sizes.plan_width, 2, dtype).to(proof.device)
            weights = [weight.detach() for weight in model.model.layers.parameters()]
            row["layer_bytes"] = sum(weight.nbytes for weight in weights) // 2
            places = [torch.empty_like(weight) for weight in weights]
            row["copy_s"] = timed(lambda: [a.copy_(b) for a, b in zip(places, weights, strict=True)], proof) / 2
            del places
            started = time.perf_counter()
            qwen2_fp16_fix.fix(model)
            wait_for(proof.device)
            row["first_s"] = (time.perf_counter() - started) / 2
            row["plan_s"] = timed(lambda: planning.plan_layers(model.model), proof) / 2
            row["copies"] = row["plan_s"] / row["copy_s"]


def timed(run: Any, proof: Proof) -> float:
    """Seconds of one run until the device is done: the median of three, after one more."""
    found = []
    for _ in range(1 + TIMES):
        wait_for(proof.device)
        started = time.perf_counter()
        run()
        wait_for(proof.device)
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])
