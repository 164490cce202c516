"""What a decode step takes of the thread that calls it: the host's time, which a GPU waits for at batch 1."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tests import stress

from .. import workloads
from ..models import DTYPES
from .proof import Proof, wait_for
from .subjects import pair

#: So small that no kernel takes longer than its launch, and the queue of the device never fills.
SMALL = stress.Shape(hidden=32, layers=12, heads=2, kv_heads=1, intermediate=64, vocab=128)
CONTEXT, STEPS = 16, 3


def host(proof: Proof) -> None:
    """CPU time of the calling thread a step, stock and fixed in turns."""
    base = stress.build(SMALL, (), attn_implementation="eager")
    for dtype in ("fp16", "bf16"):
        for attention in ("sdpa", "eager"):
            if proof.over(f"host time {dtype} {attention}"):
                continue
            with proof.row("host", dtype=dtype, attention=attention, layers=SMALL.layers) as row:
                models = pair(base, DTYPES[dtype], proof.device)
                for model in models:
                    model.config._attn_implementation = attention
                row |= paired([workloads.decode(model, CONTEXT, 1) for model in models], proof)


@torch.inference_mode()
def paired(steps: list[Callable[[], Any]], proof: Proof) -> dict[str, Any]:
    """Seconds of a step on either side, and the quartiles of fixed over stock."""
    for step in steps:
        for _ in range(2 * STEPS):
            step()
    times = []
    for at in range(proof.sizes.pairs):
        order = (0, 1) if at % 2 else (1, 0)
        taken = {side: thread_seconds(steps[side], proof.device) for side in order}
        times.append((taken[0], taken[1]))
    lower, median, upper = statistics.quantiles((b / a for a, b in times), n=4, method="inclusive")
    left, right = (statistics.median(side) for side in zip(*times, strict=True))
    return {"left": left, "right": right, "median": median, "lower": lower, "upper": upper, "pairs": len(times)}


def thread_seconds(step: Callable[[], Any], device: torch.device) -> float:
    """CPU time of this thread a step, while the device is not waited for."""
    wait_for(device)
    started = time.thread_time()
    for _ in range(STEPS):
        step()
    taken = time.thread_time() - started
    wait_for(device)
    return taken / STEPS
