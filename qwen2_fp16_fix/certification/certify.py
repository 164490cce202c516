"""The certificate: whether any prompt can make a checkpoint overflow in float16. The weights alone decide it.

A checkpoint is read layer by layer. No model is built.
"""

import math
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from ..checkpoints.folder import FolderSource
from ..checkpoints.loaded_model import ModelSource
from ..checkpoints.weights import WeightSource
from ..code_copies import code_of, sibling
from ..patches.swap import layers_of
from ..progress import Progress, with_bar
from .casting import casting_losses
from .ends import certify_ends
from .layer import certify_layer
from .result import Certificate
from .text import verdict_of


def certify(model_or_path: nn.Module | str | Path, progress: Progress = None) -> Certificate:
    """Bounds every float16 number of a Qwen2 and says whether, with the fix, any prompt can overflow it.

    model_or_path: a loaded model with a Qwen2Model inside, a checkpoint folder, or a .safetensors file with config.json
    beside it. progress: True for a bar on stderr, or a rich Console to show it on.
    Returns a Certificate: `proven`, `verdict` and `reasons` say how it ended, `layers` the headroom of each site.
    Raises CheckpointError for a folder or file that cannot be read whole, NotQwen2Error for another architecture.
    """
    started = time.monotonic()
    source: WeightSource = (
        ModelSource(model_or_path) if isinstance(model_or_path, nn.Module) else FolderSource(Path(model_or_path))
    )
    stale = dropped_plans(source) if isinstance(source, ModelSource) else []
    if isinstance(source, FolderSource):
        source.check_complete(head=None)  # an embedding of another vocabulary has a bound, but belongs to another model
    losses: dict[str, Counter[str]] = {}

    def cast(name: str, stored: Tensor) -> Tensor:
        losses.setdefault(name, Counter()).update(casting_losses(stored) | {"total": stored.numel()})
        return stored.half()

    logits, residual, reasons = certify_ends(source, cast)
    layers = []
    for number in with_bar(range(source.layers), "bounding layers", progress):
        layer, residual = certify_layer(number, source, cast, residual)
        layers.append(layer)
    casting = {name: dict(lost) for name, lost in losses.items() if len(+lost) > 1}  # more than its total
    reasons += [*stale, *(f"layer {layer.layer}: {reason}" for layer in layers for reason in layer.reasons)]
    for kind, what in (("overflow", "pass 65504"), ("nonfinite", "are NaN or infinite")):
        reasons += [f"{name}: {lost[kind]} weights {what}" for name, lost in casting.items() if lost[kind]]
    exponents = [max(layer.exponents.values(), default=0) for layer in layers]
    scaled = sum(exponent > 0 for exponent in exponents)
    return Certificate(
        proven=not reasons,
        verdict=verdict_of(reasons, len(layers), scaled),
        reasons=reasons,
        layers=layers,
        logits=logits if logits is not None and math.isfinite(logits) else None,
        casting=casting,
        scaled_layers=scaled,
        max_exponent=max(exponents, default=0),
        config=asdict(source.shape) | {"layers": source.layers, "intermediate": source.intermediate},
        seconds=round(time.monotonic() - started, 2),
    )


def dropped_plans(source: ModelSource) -> list[str]:
    """Drops the plans of a fixed model that were made for other weights. Returns a sentence for each dropped plan.

    Exponents of inputs and values stay then, and hold for the older weights only.
    """
    reasons = []
    for number, layer in enumerate(layers_of(source.base)):
        if planned := getattr(layer, "plan", None) is not None:
            sibling(code_of(layer), "planning").check_plan(layer)
        if getattr(layer, "plan", layer) is None and (planned or not getattr(layer, "plan_due", True)):
            dropped = "its exponents were planned for other weights and have been dropped, so it scales by token"
            reasons.append(f"layer {number}: {dropped}: fix the model again")
    return reasons
