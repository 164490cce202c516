"""Runs the sections of a proof in turn, and in another process where the device has been lost."""

import contextlib
import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import report
from . import accuracy, compiled, host, invariance, launches, plans, scores, timing
from .proof import Proof, Section
from .sizes import CPU, GPU, Sizes

#: In the order in which they run, with the share of the time that each may take. What is most wanted comes first.
SECTIONS: dict[str, tuple[Section, float]] = {
    "accuracy": (accuracy.accuracy, 0.12),
    "two-parts": (accuracy.two_parts, 0.04),
    "causality": (invariance.causality, 0.02),
    "switches": (invariance.switches, 0.04),
    "plans": (plans.plans, 0.05),
    "launches": (launches.launches, 0.06),
    "score-accuracy": (scores.score_accuracy, 0.04),
    "score-time": (scores.score_time, 0.08),
    "host": (host.host, 0.03),
    "decode": (timing.decode, 0.15),
    "prompts": (timing.prompts, 0.10),
    "memory": (timing.memory, 0.02),
    "planning": (plans.planning_time, 0.05),
    "compiled": (compiled.compiled, 0.18),
    "flex": (accuracy.flex, 0.08),
}


def prove(
    device: torch.device,
    budget: float,
    only: Sequence[str],
    path: Path,
    sizes: Sizes | None = None,
    resume: bool = False,
) -> Proof:
    """Runs the sections named in `only`, all if none is, within `budget` seconds, and writes `path` as it goes.

    resume: go on from what `path` holds. After a CUDA error this process is replaced by one that does so.
    """
    sizes = sizes or (GPU if device.type == "cuda" else CPU)
    proof = Proof(device, sizes, path, budget)
    proof.environment = environment(device)
    if resume:
        proof.take_up(json.loads(path.read_text(encoding="utf-8")))
    settle()
    chosen = {name: section for name, section in SECTIONS.items() if name in only or not only}
    rest = proof.run(chosen, say)
    if rest:
        begin_again(proof, rest)
    return proof


def say(line: str) -> None:
    """At once: whoever watches a machine that is lent by the minute wants to see it."""
    print(line, flush=True)


def settle() -> None:
    """Compilers and profilers warn by the page, of nothing that a proof is about.

    What the imports made stays: a full collection, one a captured graph, would walk through torch each time.
    """
    gc.collect()
    gc.freeze()
    warnings.filterwarnings("ignore")
    for name in ("torch._inductor", "torch._dynamo", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def environment(device: torch.device) -> dict[str, object]:
    """As in other results, and what kind of GPU it is."""
    found = report.environment(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"capability": f"{properties.major}.{properties.minor}", "memory_bytes": properties.total_memory}
        found |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
        with contextlib.suppress(Exception):
            found["cudnn"] = torch.backends.cudnn.version()
    return found


def begin_again(proof: Proof, rest: Sequence[str]) -> None:
    """Replaces this process by one that runs the rest: after a CUDA error nothing on the device works in this one."""
    left = proof.budget - sum(proof.seconds.values())
    say("the device does not answer any more: going on in a new process")
    only = [word for name in rest for word in ("--only", name)]
    command = ["gpu", "--device", str(proof.device), "--budget", f"{left:.0f}", "--out", str(proof.path), "--resume"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *command, *only])
