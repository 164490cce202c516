"""Plans made on the device are those made on a CPU, and what making them takes."""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import qwen2_fp16_fix
from qwen2_fp16_fix.patches import planning

from .proof import Proof, wait_for
from .subjects import named, ordinary, stressed

LAYERS, TIMES = 2, 3


def plans(proof: Proof) -> None:
    """Exponents, what attention and MLP scale, the pairs in two parts and the centre of the keys: all the same."""
    width = proof.sizes.plan_width
    subjects = {named(kinds): stressed(kinds) for kinds in proof.sizes.kinds}
    subjects[f"{width} random"] = ordinary(width, LAYERS, torch.float16, proof.device)
    for name, base in subjects.items():
        if proof.over(f"plans of {name}"):
            continue
        with proof.row("plans", weights=name) as row:
            here = qwen2_fp16_fix.fix(copy.deepcopy(base).half().cpu())
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
            row |= planned(ordinary(proof.sizes.plan_width, LAYERS, dtype, proof.device))


def planned(model: Any) -> dict[str, Any]:
    """Bytes of a layer, and seconds: of a copy of them, of the plan at `fix`, and of one more once all is warm."""
    layers, device = model.model.layers, model.device
    weights = [weight.detach() for weight in layers.parameters()]
    places = [torch.empty_like(weight) for weight in weights]

    def copy_all() -> None:
        for place, weight in zip(places, weights, strict=True):
            place.copy_(weight)

    copied = median_seconds(copy_all, device)
    places.clear()
    first = seconds_of(lambda: qwen2_fp16_fix.fix(model), device)
    again = median_seconds(lambda: planning.plan_layers(model.model), device)
    found = {"copy_s": copied, "first_s": first, "plan_s": again}
    a_layer = {name: value / len(layers) for name, value in found.items()}
    layer_bytes = sum(weight.nbytes for weight in weights) // len(layers)
    return {"layer_bytes": layer_bytes, **a_layer, "copies": again / copied}


def median_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The median of three, after one more."""
    return statistics.median([seconds_of(run, device) for _ in range(1 + TIMES)][1:])


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run until the device is done."""
    wait_for(device)
    started = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - started
