"""The certificate: whether any prompt can make a checkpoint overflow in float16, from its weights, layer by layer.

`certify` returns plain data; `render` shows it. A checkpoint is read layer by layer; no model is built.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from .checkpoints.folder import FolderSource
from .checkpoints.loaded_model import ModelSource
from .checkpoints.weights import UnboundedWeightError, WeightSource, check_shape
from .code_copies import code_of, sibling
from .patches.range_plan import (
    FLOAT16_MAX,
    LIMIT,
    Exponents,
    LayerBounds,
    LayerShape,
    bits_below,
    bound_layer,
    bound_logits,
    bound_norm,
    headroom_bits,
    layer_shapes,
    plan_layer,
    unproven_sites,
)
from .patches.swap import layers_of

SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal
CHUNK = 2**19  # numbers counted at a time: what stays in a core's cache

Cast = Callable[[str, Tensor], Tensor]  # a weight's name and values to its float16 values


def certify(model_or_path: nn.Module | str | Path, progress: Console | None = None) -> dict[str, Any]:
    """Bounds every float16 number of a Qwen2 and says whether, with the fix, any prompt can overflow it.

    model_or_path: a loaded model with a Qwen2Model inside, a checkpoint folder, or a .safetensors file with config.json
    beside it. progress: a rich Console to show a bar on.
    Returns a dict fit for JSON: `proven`, `verdict` (a sentence), `reasons`, `layers` (each with `layer`, `exponents`,
    `bounds`, `headroom_bits`, `proven`, `stock_headroom_bits`, `stock_proven`, `reasons`), `logits`,
    `casting` (what the cast of the stored weights to float16 loses, by tensor, where it loses anything),
    `scaled_layers` and `max_exponent`, `config` (the sizes), `seconds`.
    Bounds are in units of the values themselves; the float16 range ends at 65504. One that is infinite is None.
    Stock's sites are the plan's without exponents, and two that the fix keeps in fp32: `scores`, which eager attention
    stores unscaled, and `residual`.
    Raises CheckpointError for a folder or file that cannot be read whole, NotQwen2Error for another architecture.
    """
    started = time.monotonic()
    source: WeightSource = (
        ModelSource(model_or_path) if isinstance(model_or_path, nn.Module) else FolderSource(Path(model_or_path))
    )
    if isinstance(source, FolderSource):
        source.check_complete(head=None)  # an embedding of another vocabulary has a bound, but belongs to another model
    stale = dropped_plans(source) if isinstance(source, ModelSource) else []
    losses: dict[str, Counter[str]] = {}

    def cast(name: str, stored: Tensor) -> Tensor:
        losses.setdefault(name, Counter()).update(casting_losses(stored) | {"total": stored.numel()})
        return stored.half()

    logits, residual, reasons = certify_ends(source, cast)
    reasons += stale
    layers = []
    numbers = range(source.layers)
    for number in numbers if progress is None else track(numbers, "bounding layers", console=progress):
        layer = certify_layer(number, source, cast, residual)
        residual = layer.pop("residual")
        layers.append(layer)
        reasons += [f"layer {number}: {reason}" for reason in layer["reasons"]]
    casting = {name: dict(lost) for name, lost in losses.items() if len(+lost) > 1}  # more than its total
    reasons += [f"{name}: {lost['overflow']} weights pass 65504" for name, lost in casting.items() if lost["overflow"]]
    reasons += [
        f"{name}: {lost['nonfinite']} weights are NaN or infinite"
        for name, lost in casting.items()
        if lost["nonfinite"]
    ]
    exponents = [max(layer["exponents"].values(), default=0) for layer in layers]
    scaled = sum(exponent > 0 for exponent in exponents)
    return {
        "proven": not reasons,
        "verdict": _verdict(reasons, len(layers), scaled),
        "reasons": reasons,
        "layers": layers,
        "logits": logits if logits is not None and math.isfinite(logits) else None,
        "casting": casting,
        "scaled_layers": scaled,
        "max_exponent": max(exponents, default=0),
        "config": asdict(source.shape) | {"layers": source.layers, "intermediate": source.intermediate},
        "seconds": round(time.monotonic() - started, 2),
    }


def _verdict(reasons: list[str], layers: int, scaled: int) -> str:
    if reasons:
        return f"Not provable: {reasons[0]}" + (f", and {len(reasons) - 1} more." if len(reasons) > 1 else ".")
    return (
        f"Proven: with the fix, no prompt can make this checkpoint overflow in float16 ({layers} layers, {scaled} of "
        "them with an exponent above 0)."
    )


def certify_layer(number: int, source: WeightSource, cast: Cast, residual: float) -> dict[str, Any]:
    """The bounds of one layer, its exponents and what they leave unproven. residual: its bound before the layer.

    The result's own `residual` is the bound after it.
    """
    wanted = layer_shapes(source.shape, source.intermediate)
    try:
        weights = {}
        for name in source.layer_names(number):
            full = f"{source.prefix}layers.{number}.{name}"
            weights[name] = check_shape(full, cast(full, source.read(full)), wanted[name])
        bounds = bound_layer(weights, source.shape)
    except UnboundedWeightError as reason:
        empty: dict[str, Any] = {"exponents": {}, "bounds": {}, "headroom_bits": {}, "stock_headroom_bits": {}}
        unknown = {"proven": False, "stock_proven": False, "residual": math.inf}
        return {"layer": number, **empty, **unknown, "reasons": [str(reason)]}
    exponents = plan_layer(bounds)
    unproven = unproven_sites(bounds, exponents)
    residual += bounds.o_proj + bounds.down_proj
    stock = headroom_bits(bounds, Exponents(0, 0))
    stock["scores"] = bits_below(LIMIT, bound_scores(weights, source.shape))
    stock["residual"] = bits_below(FLOAT16_MAX, residual)
    return {
        "layer": number,
        "exponents": exponents._asdict(),
        "bounds": _finite(asdict(bounds)),
        "headroom_bits": _finite(headroom_bits(bounds, exponents)),
        "proven": not unproven,
        "stock_headroom_bits": _finite(stock),
        "stock_proven": all(bits >= 0 for bits in stock.values()),
        "reasons": [_reason(site, bounds, exponents) for site in unproven],
        "residual": residual,
    }


def dropped_plans(source: ModelSource) -> list[str]:
    """Drops every plan of a fixed model that is not for its weights as they are, and says so."""
    reasons = []
    for number, layer in enumerate(layers_of(source.base)):
        if getattr(layer, "plan", None) is not None:
            sibling(code_of(layer), "planning").check_plan(layer)
            if layer.plan is None:
                reasons.append(
                    f"layer {number}: its exponents were planned for other weights and have been dropped, so it "
                    "scales by token: fix the model again"
                )
    return reasons


def bound_scores(weights: Mapping[str, Tensor], shape: LayerShape) -> float:
    """The largest raw score |q·k| of a layer, before it is scaled: ‖q‖·‖k‖ over the heads, in exact arithmetic.

    ‖q‖ <= √d·σ(W∘γ) + ‖b‖ for a head's rows W, with the largest singular value σ from the Gram matrix, in fp64 on the
    CPU: not every device has it.
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
    """The largest bound over the heads (None without one), the embedding's largest number, and what is unproven."""
    reasons = list(source.warnings)
    hidden, embedding = source.shape.hidden, f"{source.prefix}embed_tokens.weight"
    heads = source.heads()
    logits, largest = None, 0.0
    # Bounds nothing, where the norm cannot be read.
    gain = torch.full((hidden,), math.inf, dtype=torch.float32, device="cpu")
    try:
        norm = f"{source.prefix}norm.weight"
        gain = check_shape(norm, cast(norm, source.read(norm)), (hidden,))
        if not bound_norm(gain) <= FLOAT16_MAX:
            reasons.append(f"the final norm is bounded by {bound_norm(gain):.3g} only")
    except UnboundedWeightError as reason:
        reasons.append(str(reason))
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


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """The values with None for what is not finite, which JSON does not know."""
    return {site: value if math.isfinite(value) else None for site, value in values.items()}


def _reason(site: str, bounds: LayerBounds, exponents: Exponents) -> str:
    bound = asdict(bounds)[site]
    if not math.isfinite(bound):
        return f"{site} has no finite bound"
    missing = -headroom_bits(bounds, exponents)[site]
    return f"{site} is bounded by {bound:.3g} only, {missing:.1f} bits too large"


def casting_losses(stored: Tensor) -> dict[str, int]:
    """How many numbers a cast to float16 makes infinite, zero or subnormal, and how many are not finite before."""
    lost = Counter[str](overflow=0, flushed=0, subnormal=0, nonfinite=0)
    for part in torch.split(stored.reshape(-1), CHUNK):
        before = part.abs()
        lost["nonfinite"] += part.numel() - int((before < math.inf).sum())
        if stored.dtype != torch.float16:
            after = part.half().abs()
            zeros = int((after == 0).sum())
            lost["overflow"] += int((after == math.inf).sum()) - int((before == math.inf).sum())
            lost["flushed"] += zeros - int((before == 0).sum())
            lost["subnormal"] += int((after < SMALLEST_NORMAL).sum()) - zeros
    return dict(lost)


def render(certificate: dict[str, Any], console: Console) -> None:
    """Prints the table of bounds, fixed beside stock, what the cast loses, and the verdict."""
    table = Table("layer", "tightest site", "bound", "headroom, bits", "2^-e MLP", "2^-e o_proj", "stock, bits")
    for layer in certificate["layers"]:
        if not layer["bounds"]:
            table.add_row(str(layer["layer"]), "; ".join(layer["reasons"]), "", "", "", "", "")
            continue
        site, bits = _tightest(layer["headroom_bits"])
        stock_site, stock_bits = _tightest(layer["stock_headroom_bits"])
        table.add_row(
            str(layer["layer"]),
            site,
            _number(layer["bounds"][site]),
            _number(bits, ".1f"),
            str(layer["exponents"]["mlp"]),
            str(layer["exponents"]["o_proj"]),
            f"{_number(stock_bits, '.1f')} ({stock_site})",
        )
    console.print(table)
    for name, lost in certificate["casting"].items():
        parts = [f"{count} {what}" for what, count in lost.items() if what != "total" and count]
        console.print(f"{name}: cast to float16, {', '.join(parts)} of {lost['total']}", highlight=False)
    console.print(f"logits: bound {_number(certificate['logits'])}", highlight=False)
    for reason in certificate["reasons"][1:]:
        console.print(f"not provable: {reason}", highlight=False, markup=False)
    console.print(certificate["verdict"], highlight=False, markup=False)


def _tightest(headroom: dict[str, float | None]) -> tuple[str, float | None]:
    """The site with the least headroom; one without a finite bound comes first."""
    return min(headroom.items(), key=lambda item: -math.inf if item[1] is None else item[1])


def _number(number: float | None, form: str = ",.4g") -> str:
    return "none" if number is None else format(number, form)
