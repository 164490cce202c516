"""The certificate: whether any prompt can make a checkpoint overflow in float16. The weights alone decide it.

A checkpoint is read layer by layer. No model is built.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from .checkpoints.folder import FolderSource
from .checkpoints.loaded_model import ModelSource
from .checkpoints.weights import UnboundedWeightError, WeightSource, check_shape
from .code_copies import code_of, sibling
from .patches.range_bounds import LayerShape, bound_logits, bound_norm, layer_shapes
from .patches.range_plan import (
    FLOAT16_MAX,
    LIMIT,
    PlannedLayer,
    bits_below,
    headroom_bits,
    plan_layer,
    stock_headroom_bits,
    unproven_sites,
)
from .patches.swap import layers_of
from .progress import Progress, with_bar
from .results import Record, Result

SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal
NUMBERS_AT_A_TIME = 2**19  # counted together; few enough for a core's cache

Cast = Callable[[str, Tensor], Tensor]  # a weight's name and values to its float16 values


@dataclass(frozen=True)
class LayerCertificate(Record):
    """The bounds of one layer, by site, in units of the values themselves. A bound that is infinite is None.

    The fixed layer's q, k and v are bounded without their biases; `value` is v, `biased_q` and `biased_k` are q and k
    with them. Stock's q, k and v have them. Stock has two sites more, which the fix keeps in fp32: `scores`, which
    eager attention stores before they are scaled, and `residual`. A layer that cannot be bounded has none of either.
    """

    layer: int
    exponents: dict[str, int]  # of the powers of two that keep the layer in range, by what they scale
    bounds: dict[str, float | None]
    headroom_bits: dict[str, float | None]  # how many times a bound could double
    proven: bool
    stock_headroom_bits: dict[str, float | None]
    stock_proven: bool
    reasons: list[str]  # why the layer is not proven


@dataclass(frozen=True, repr=False)
class Certificate(Result):
    """The result of `certify`."""

    proven: bool  # with the fix, no prompt can make it overflow
    verdict: str
    reasons: list[str]  # why it is not proven
    layers: list[LayerCertificate]
    logits: float | None  # the largest that any prompt can give; None without a head or without a finite bound
    casting: dict[str, dict[str, int]]  # by tensor, the numbers that a cast to float16 changes; others are left out
    scaled_layers: int  # with an exponent above 0
    max_exponent: int
    config: dict[str, int | float]  # the sizes of the model
    seconds: float

    def summary(self) -> str:
        """The verdict."""
        return self.verdict

    def __rich__(self) -> RenderableType:
        """The bounds of the layers, fixed beside stock; the losses of the cast to float16; and the verdict."""
        table = Table("layer", "tightest site", "bound", "headroom, bits", "exponents", "stock, bits")
        for layer in self.layers:
            table.add_row(str(layer.layer), *_row(layer))
        lines = []
        for name, lost in self.casting.items():
            parts = [f"{count} {what}" for what, count in lost.items() if what != "total" and count]
            lines.append(f"{name}: cast to float16, {', '.join(parts)} of {lost['total']}")
        unproven = [f"not provable: {reason}" for reason in self.reasons[1:]]  # the first is in the verdict
        lines += [f"logits: bound {_number(self.logits)}", *unproven, self.verdict]
        return Group(table, *map(Text, lines))


def _row(layer: LayerCertificate) -> list[str]:
    if not layer.bounds:
        return ["; ".join(layer.reasons), "", "", "", ""]
    (site, bits), (stock_site, stock_bits) = map(_tightest, (layer.headroom_bits, layer.stock_headroom_bits))
    exponents = "\n".join(f"{name} {exponent}" for name, exponent in layer.exponents.items() if exponent)
    stock = f"{_number(stock_bits, '.1f')} ({stock_site})"
    return [site, _number(layer.bounds[site]), _number(bits, ".1f"), exponents or "0", stock]


def _tightest(headroom: dict[str, float | None]) -> tuple[str, float | None]:
    """The site with the least headroom. A site without a finite bound comes first."""
    return min(headroom.items(), key=lambda item: -math.inf if item[1] is None else item[1])


def _number(number: float | None, form: str = ",.4g") -> str:
    return "none" if number is None else format(number, form)


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
        verdict=_verdict(reasons, len(layers), scaled),
        reasons=reasons,
        layers=layers,
        logits=logits if logits is not None and math.isfinite(logits) else None,
        casting=casting,
        scaled_layers=scaled,
        max_exponent=max(exponents, default=0),
        config=asdict(source.shape) | {"layers": source.layers, "intermediate": source.intermediate},
        seconds=round(time.monotonic() - started, 2),
    )


def _verdict(reasons: list[str], layers: int, scaled: int) -> str:
    if reasons:
        return f"Not provable: {reasons[0]}" + (f", and {len(reasons) - 1} more." if len(reasons) > 1 else ".")
    return (
        f"Proven: with the fix, no prompt can make this checkpoint overflow in float16 ({layers} layers, {scaled} of "
        "them with an exponent above 0)."
    )


def certify_layer(number: int, source: WeightSource, cast: Cast, residual: float) -> tuple[LayerCertificate, float]:
    """The bounds of one layer and the bound of the residual after it. residual: its bound before the layer."""
    wanted = layer_shapes(source.shape, source.intermediate)
    try:
        weights = {}
        for name in source.layer_names(number):
            full = f"{source.prefix}layers.{number}.{name}"
            weights[name] = check_shape(full, cast(full, source.read(full)), wanted[name])
        planned = plan_layer(weights, source.shape)
    except UnboundedWeightError as reason:
        return LayerCertificate(number, {}, {}, {}, False, {}, False, [str(reason)]), math.inf
    exponents, bounds = planned.exponents, planned.bounds
    unproven = unproven_sites(bounds, exponents)
    residual += bounds.o_proj + bounds.down_proj
    stock = stock_headroom_bits(planned.unscaled)
    stock["scores"] = bits_below(LIMIT, bound_scores(weights, source.shape))
    stock["residual"] = bits_below(FLOAT16_MAX, residual)
    found = LayerCertificate(
        layer=number,
        exponents=exponents._asdict(),
        bounds=_finite(asdict(bounds)),
        headroom_bits=_finite(headroom_bits(bounds, exponents)),
        proven=not unproven,
        stock_headroom_bits=_finite(stock),
        stock_proven=all(bits >= 0 for bits in stock.values()),
        reasons=[_reason(site, planned) for site in unproven],
    )
    return found, residual


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


def bound_scores(weights: Mapping[str, Tensor], shape: LayerShape) -> float:
    """The largest raw score |q·k| of a layer, before it is scaled: ‖q‖·‖k‖ over the heads, in exact arithmetic.

    ‖q‖ <= √d·σ(W∘γ) + ‖b‖ for the rows W of a head. The largest singular value σ comes from the Gram matrix, in fp64 on
    the CPU, since some devices have no fp64.
    """
    gain = weights["input_layernorm.weight"].cpu().double()
    lengths = {}
    for name, heads in (("q", shape.heads), ("k", shape.kv_heads)):
        rows = weights[f"self_attn.{name}_proj.weight"].cpu().double().view(heads, shape.head_dim, shape.hidden) * gain
        bias = weights.get(f"self_attn.{name}_proj.bias")
        shift = 0.0 if bias is None else bias.cpu().double().view(heads, shape.head_dim).norm(dim=1)
        if not rows.isfinite().all():
            return math.inf
        singular = torch.linalg.eigvalsh(rows @ rows.transpose(1, 2))[:, -1].clamp(min=0).sqrt()
        lengths[name] = (singular * math.sqrt(shape.hidden) + shift) * shape.rotation_scale
    grouped = lengths["q"].view(shape.kv_heads, -1) * lengths["k"].view(-1, 1)
    return float(grouped.max())


def certify_ends(source: WeightSource, cast: Cast) -> tuple[float | None, float, list[str]]:
    """The largest bound of the logits (None without a head), the embedding's largest number, and the obstacles."""
    gain, unproven = read_final_norm(source, cast)
    reasons = [*source.warnings, *unproven]
    hidden, embedding = source.shape.hidden, f"{source.prefix}embed_tokens.weight"
    heads = source.heads()
    logits, largest = None, 0.0
    for name in dict.fromkeys((embedding, *heads)):
        try:
            found = 0.0
            for stored in source.rows(name):
                rows = check_shape(name, cast(name, stored), (len(stored), hidden))
                if name == embedding:
                    largest = max(largest, float(rows.abs().max()))
                if name in heads:
                    found = max(found, bound_logits(gain, rows))
            bias = name.removesuffix("weight") + "bias"
            if name in heads and source.has(bias):
                found += float(cast(bias, source.read(bias)).abs().max())
        except UnboundedWeightError as reason:
            reasons.append(str(reason))
            largest = math.inf if name == embedding else largest
            continue
        if name in heads:
            logits = max(found, logits or 0.0)
    if logits is not None and not logits <= LIMIT:
        reasons.append(f"logits: bound {logits:.3g}")
    return logits, largest, reasons


def read_final_norm(source: WeightSource, cast: Cast) -> tuple[Tensor, list[str]]:
    """The gain (hidden,) of the final norm, infinite if it cannot be read, and the obstacles to a proof."""
    hidden, name = source.shape.hidden, f"{source.prefix}norm.weight"
    try:
        gain = check_shape(name, cast(name, source.read(name)), (hidden,))
    except UnboundedWeightError as reason:
        return torch.full((hidden,), math.inf, dtype=torch.float32, device="cpu"), [str(reason)]
    bound = bound_norm(gain)
    return gain, [] if bound <= FLOAT16_MAX else [f"the final norm is bounded by {bound:.3g} only"]


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """The values, with None for those that are not finite: JSON has no infinity."""
    return {site: value if math.isfinite(value) else None for site, value in values.items()}


def _reason(site: str, planned: PlannedLayer) -> str:
    bound = asdict(planned.bounds)[site]
    if not math.isfinite(bound):
        return f"{site} has no finite bound"
    missing = -headroom_bits(planned.bounds, planned.exponents)[site]
    return f"{site} is bounded by {bound:.3g} only, {missing:.1f} bits too large for the largest exponent"


def casting_losses(stored: Tensor) -> dict[str, int]:
    """How many numbers a cast to float16 makes infinite, zero or subnormal, and how many were not finite before."""
    lost = Counter[str](overflow=0, flushed=0, subnormal=0, nonfinite=0)
    for part in torch.split(stored.reshape(-1), NUMBERS_AT_A_TIME):
        before = part.abs()
        lost["nonfinite"] += part.numel() - int((before < math.inf).sum())
        if stored.dtype != torch.float16:
            after = part.half().abs()
            zeros = int((after == 0).sum())
            lost["overflow"] += int((after == math.inf).sum()) - int((before == math.inf).sum())
            lost["flushed"] += zeros - int((before == 0).sum())
            lost["subnormal"] += int((after < SMALLEST_NORMAL).sum()) - zeros
    return dict(lost)
