"""The cells of the benchmark: one comparison each. What to run is chosen by naming values of their fields."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from . import workloads
from .cost import cost_of
from .models import LAYERS, Workshop
from .pairs import compare

RIVALS = ("stock bf16", "stock fp32", "fp32 scores", "clamped")


@dataclass(frozen=True)
class Cell:
    """A variant against its baseline. phase: prefill, decode (tokens is the context then) or memory (of a prefill)."""

    phase: str
    width: str
    attention: str
    tokens: int
    batch: int = 1
    variant: str = "fixed fp16"
    compiled: bool = False

    @property
    def baseline(self) -> str:
        """Stock in the dtype of the fixed one; stock float16 for what a user would pick instead."""
        return "stock bf16" if self.variant == "fixed bf16" else "stock fp16"


def full_grid() -> Iterator[Cell]:
    """Everything that is measured, by width, since building a width takes time."""
    for width, attention in product(("0.5b", "1.5b", "7b"), ("eager", "sdpa")):
        for variant in ("fixed fp16", "fixed bf16"):
            yield from (Cell("prefill", width, attention, tokens, 1, variant) for tokens in (128, 512, 2048))
            contexts = product((1, 8), (64, 1024, 4096))
            yield from (Cell("decode", width, attention, tokens, batch, variant) for batch, tokens in contexts)
            yield Cell("memory", width, attention, 2048, 1, variant)
        for variant in RIVALS:
            if attention == "eager" or variant != "fp32 scores":
                yield from (Cell("prefill", width, attention, tokens, 1, variant) for tokens in (128, 512))
                yield Cell("decode", width, attention, 1024, 1, variant)
                yield Cell("memory", width, attention, 2048, 1, variant)
        if width == "0.5b":  # compiling takes a minute a cell
            yield Cell("prefill", width, attention, 512, compiled=True)
            yield Cell("decode", width, attention, 1024, compiled=True)


def is_quick(cell: Cell) -> bool:
    """Whether a cell belongs to the default run, which takes minutes instead of hours on a slow CPU."""
    if cell.compiled or cell.batch > 1 or cell.width == "1.5b" or (cell.width == "7b" and cell.phase == "prefill"):
        return False
    if cell.phase == "memory":
        return cell.variant == "fixed fp16"
    if cell.variant != "fixed fp16" and cell.width != "0.5b":
        return False
    return cell.tokens == (128 if cell.phase == "prefill" else 1024)


def measure(cell: Cell, workshop: Workshop, layers: int | None, budget: float) -> dict[str, Any]:
    """The cell's fields, its layers, and what was found: a ratio of seconds, or of bytes for memory. Fit for JSON."""
    layers = LAYERS[cell.width] if layers is None else layers
    models = [workshop.model(variant, cell.width, layers, cell.attention) for variant in (cell.baseline, cell.variant)]
    row = asdict(cell) | {"baseline": cell.baseline, "layers": layers}
    if cell.phase == "memory":
        before, after = (peak_bytes(workloads.prefill(m, cell.tokens, cell.batch), workshop.device) for m in models)
        return row | {"left": before, "right": after, "median": after / before}
    if cell.compiled:
        models = [torch.compile(model, fullgraph=True, dynamic=False) for model in models]
    ask = workloads.prefill if cell.phase == "prefill" else workloads.decode
    if cell.compiled and cell.phase == "decode":
        ask = workloads.decode_statically
    left, right = (ask(model, cell.tokens, cell.batch) for model in models)
    return row | compare(left, right, workshop.device, budget).as_dict()


def peak_bytes(step: workloads.Step, device: torch.device) -> int:
    """Most bytes above what was there before: a GPU's own account, else the exact count of what tensors held."""
    if device.type != "cuda":
        return cost_of(step, compute=False).peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.no_grad():
        step()
    return torch.cuda.max_memory_allocated(device) - before
