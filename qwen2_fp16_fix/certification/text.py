"""A certificate in words: the verdict, the reasons of a layer, and the table of a terminal."""

import math
from dataclasses import asdict

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..patches.range_plan import PlannedLayer, headroom_bits
from .assumptions import Assumptions
from .result import Certificate, LayerCertificate


def table_of(found: Certificate) -> Group:
    """The bounds of the layers, fixed beside stock; the losses of the cast to float16; and the verdict."""
    table = Table("layer", "tightest site", "bound", "headroom, bits", "exponents", "stock, bits")
    for layer in found.layers:
        table.add_row(str(layer.layer), *_row(layer))
    lines = []
    for name, lost in found.casting.items():
        parts = [f"{count} {what}" for what, count in lost.items() if what != "total" and count]
        lines.append(f"{name}: cast to float16, {', '.join(parts)} of {lost['total']}")
    unproven = [f"not provable: {reason}" for reason in found.reasons[1:]]  # the first is in the verdict
    lines += [f"logits: bound {_number(found.logits)}", *unproven, found.verdict]
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


def verdict_of(reasons: list[str], assumed: Assumptions, layers: int, scaled: int) -> str:
    """The result in one sentence. layers, scaled: how many there are, and how many have an exponent above 0."""
    if reasons:
        return f"Not provable: {reasons[0]}" + (f", and {len(reasons) - 1} more." if len(reasons) > 1 else ".")
    dropout = "".join(f"; in training {sentence}" for sentence in assumed.dropouts)
    return (
        f"Proven: with the fix, no prompt of up to {assumed.positions:,} tokens can make this checkpoint overflow in "
        f"float16 ({layers} layers, {scaled} of them with an exponent above 0). This does not cover layers that are "
        f"offloaded, sharded, quantised, adapted or trained, which scale by token{dropout}."
    )


def unproven_reason(site: str, planned: PlannedLayer) -> str:
    """Why a site of a layer is not proven."""
    bound = asdict(planned.bounds)[site]
    if not math.isfinite(bound):
        return f"{site} has no finite bound"
    missing = -headroom_bits(planned.bounds, planned.exponents)[site]
    return f"{site} is bounded by {bound:.3g} only, {missing:.1f} bits too large for the largest exponent"
