"""The sections of a proof, in the order in which they run."""

import contextlib
import gc
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
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

    resume: go on from what `path` holds.
    """
    sizes = sizes or (GPU if device.type == "cuda" else CPU)
    proof = Proof(device, sizes, path, budget)
    proof.environment = environment(device)
    if resume:
        proof.take_up(json.loads(path.read_text(encoding="utf-8")))
    chosen = {name: section for name, section in SECTIONS.items() if name in only or not only}
    with settled():
        proof.run(chosen, say)
    return proof


def say(line: str) -> None:
    """At once: whoever watches a machine that is lent by the minute wants to see it."""
    print(line, flush=True)


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Without the warnings of compilers and profilers, which come by the page and are not what a proof is about.

    What the imports made stays: a full collection would walk through torch each time.
    """
    gc.collect()
    gc.freeze()
    loggers = [logging.getLogger(name) for name in ("torch._inductor", "torch._dynamo", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


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
