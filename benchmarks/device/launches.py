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
                            row |= beside(*of_a_layer(row, model, proof.device))
                            hold(proof, row)


def of_a_layer(row: dict[str, Any], model: Any, device: torch.device) -> tuple["Counter[str]", "Counter[str] | None"]:
    """What the third layer launches, by our names and by those of the profiler, which sees none on a CPU."""
    ask = workloads.prefill if row["phase"] == "prefill" else workloads.decode
    ours, theirs = [], []
    for layers in (2, 3):
        with first_layers(model, layers), torch.no_grad():
            step = ask(model, row["tokens"], 1)
            found: Counter[str] = Counter()
            for launch, count in cost_of(step, compute=False).launches.items():
                found[launch.name] += count
            ours.append(found)
            theirs.append(seen(step, device) if device.type == "cuda" else None)
    kernels = None if None in theirs else difference(theirs[1], theirs[0])  # type: ignore[arg-type]
    return difference(ours[1], ours[0]), kernels


def beside(counted: "Counter[str]", kernels: "Counter[str] | None") -> dict[str, Any]:
    """Both counts, and the names on both sides where they are further apart than one."""
    if kernels is None:
        return {"counted": counted.total(), "seen": None, "helpers": None}
    helpers = sum(count for name, count in kernels.items() if any(each in name.lower() for each in HELPERS))
    result: dict[str, Any] = {"counted": counted.total(), "seen": kernels.total() - helpers, "helpers": helpers}
    if is_apart(result):
        result |= {"our_names": by_count(counted), "their_names": by_count(kernels)}
    return result


def is_apart(row: dict[str, Any]) -> bool:
    """Whether the two counts of a row contradict each other."""
    return row["seen"] is not None and abs(row["seen"] - row["counted"]) > MOST_APART


def hold(proof: Proof, row: dict[str, Any]) -> None:
    """Where they do, our count is wrong."""
    where = "{width} {attention} {model} {phase} {tokens:,}".format(**row)
    sentence = f"The profiler sees {row['seen']} kernels a layer of {where}, and we count {row['counted']}."
    proof.promise(not is_apart(row), sentence)


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
