"""Kernels that torch's profiler sees on the device, beside those that benchmarks/cost.py counts, a layer."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .. import workloads
from ..cost import cost_of, difference
from ..models import first_layers
from .proof import NotAvailable, Proof, wait_for
from .subjects import ordinary, twins

CASES = (("prefill", 512), ("decode", 1024))
#: Parts of names of kernels that a library starts for itself beside the one that was asked for, to add up partial sums.
HELPERS = ("splitkreduce", "splitk_reduce", "splitkv_combine", "combine_kernel", "memset")
MOST_APART = 1


def launches(proof: Proof) -> None:
    """Three layers less two, stock and fixed. Our count may be one off."""
    for width in proof.sizes.launch_widths:
        weights = ordinary(width, 3, torch.float16, proof.device)
        for attention in ("eager", "sdpa"):
            for model_name, model in zip(("stock", "fixed"), twins(weights, attention), strict=True):
                for phase, size in CASES:
                    case = {"width": width, "attention": attention, "model": model_name, "phase": phase, "tokens": size}
                    if not proof.over("launches of " + " ".join(map(str, case.values()))):
                        with proof.row("launches", **case) as row:
                            row |= of_a_layer(proof, row, model)


def of_a_layer(proof: Proof, row: dict[str, Any], model: Any) -> dict[str, Any]:
    """Both counts of the third layer, and the names on both sides where they are further apart than one."""
    ask = workloads.prefill if row["phase"] == "prefill" else workloads.decode
    ours, theirs = [], []
    for layers in (2, 3):
        with first_layers(model, layers), torch.no_grad():
            step = ask(model, row["tokens"], 1)
            found: Counter[str] = Counter()
            for launch, count in cost_of(step, compute=False).launches.items():
                found[launch.name] += count
            ours.append(found)
            theirs.append(seen(step, proof.device) if proof.device.type == "cuda" else Counter())
    counted, kernels = difference(ours[1], ours[0]), difference(theirs[1], theirs[0])
    result: dict[str, Any] = {"counted": counted.total(), "seen": None, "helpers": None}
    if proof.device.type != "cuda":
        return result
    helpers = sum(count for name, count in kernels.items() if any(each in name.lower() for each in HELPERS))
    result |= {"seen": kernels.total() - helpers, "helpers": helpers}
    apart = abs(result["seen"] - result["counted"])
    if apart > MOST_APART:
        result |= {"our_names": by_count(counted), "their_names": by_count(kernels)}
    where = "{width} {attention} {model} {phase} {tokens:,}".format(**row)
    proof.promise(
        apart <= MOST_APART,
        f"The profiler sees {result['seen']} kernels a layer of {where}, and we count {result['counted']}.",
    )
    return result


def seen(step: Callable[[], Any], device: torch.device) -> "Counter[str]":
    """The names of what ran on the device in one step, how often each. Raises NotAvailable if the profiler saw none."""
    for _ in range(2):
        step()
    wait_for(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        wait_for(device)
    ran = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    names = [event.name for event in ran if not getattr(event, "is_user_annotation", False)]
    if not names:
        raise NotAvailable("torch's profiler saw no kernel")
    return Counter(name[:160] for name in names)


def by_count(names: "Counter[str]") -> dict[str, int]:
    """The most frequent first."""
    return dict(sorted(names.items(), key=lambda entry: (-entry[1], entry[0])))
