"""A certificate in words: the verdict, the reasons of a layer, a page of one screen, and all the details."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..patches.range_plan import FLOAT16_MAX, LIMIT, LIMITS, PlannedLayer, headroom_bits
from ..translations import CERTIFY_TEXTS, number_text
from .assumptions import Assumptions
from .result import Certificate, LayerCertificate

REASONS_SHOWN = 5  # a damaged checkpoint may have several for each layer
CAST = ("overflow", "nonfinite", "flushed", "subnormal")  # the worst first


class Tightest(NamedTuple):
    """The site with the least headroom in a layer. A site without a finite bound comes first."""

    layer: int
    site: str
    bits: float | None

    @property
    def limit(self) -> float:
        """What float16 holds there: a sum has less room than a stored number, as its parts may be rounded up."""
        return FLOAT16_MAX if self.site == "residual" else LIMITS.get(self.site, LIMIT)

    @property
    def stored(self) -> float | None:
        """The bound of what float16 stores there, after the layer's exponents: `limit` is `bits` above it."""
        return None if self.bits is None else self.limit * 2.0**-self.bits


def page_of(found: Certificate) -> Group:
    """The verdict, and what it rests on in a few lines: the tightest places, the exponents, the cast to float16."""
    say = CERTIFY_TEXTS[found.language]
    below = [*_stock(found), *_exponents(found), *_cast(found), say["more"]]
    return Group(_verdict(found), *map(Text, [*_other_reasons(found), ""]), _summary(found), *map(Text, ["", *below]))


def details_of(found: Certificate) -> Group:
    """The verdict and all reasons, then every layer, fixed beside stock, and every tensor that the cast changes."""
    say = CERTIFY_TEXTS[found.language]
    above = [say["reason"].format(reason=reason) for reason in found.reasons[1:]]
    above += [say["assumes"].format(sentence=sentence) for sentence in found.assumes]
    below: list[RenderableType] = [Text(), *map(Text, [*_stock(found), *_exponents(found), *_cast(found)])]
    shown: list[RenderableType] = [_verdict(found), *map(Text, [*above, ""]), _layers(found), Text(), _summary(found)]
    below += [Text(), _tensors(found)] if found.casting else []
    return Group(*shown, *below)


def tightest(layer: LayerCertificate, stock: bool) -> Tightest:
    """The tightest site of a layer that has bounds."""
    headroom = layer.stock_headroom_bits if stock else layer.headroom_bits
    site, bits = min(headroom.items(), key=lambda item: -math.inf if item[1] is None else item[1])
    return Tightest(layer.layer, site, bits)


def _verdict(found: Certificate) -> Text:
    return Text(found.verdict, style="bold green" if found.proven else "bold red")


def _other_reasons(found: Certificate) -> Iterator[str]:
    """The reasons after the first, which is in the verdict."""
    say, others = CERTIFY_TEXTS[found.language], found.reasons[1:]
    yield from (say["reason"].format(reason=reason) for reason in others[:REASONS_SHOWN])
    if len(others) > REASONS_SHOWN:
        yield say["more_reasons"].format(count=len(others) - REASONS_SHOWN)


def _summary(found: Certificate) -> Table:
    """The tightest place of all layers, fixed and stock, and the logits: a bound, its limit and the bits between."""
    say = CERTIFY_TEXTS[found.language]
    table = _table(say, "what", "site", "layer", "bound", "limit", "bits")
    bounded = [layer for layer in found.layers if layer.bounds]
    for stock in (False, True) if bounded else ():
        place = min((tightest(layer, stock) for layer in bounded), key=lambda each: _order(each.bits))
        table.add_row(say["stock" if stock else "fixed"], place.site, str(place.layer), *_scale(found, place))
    if found.logits is not None:
        bits = math.log2(LIMIT / found.logits) if found.logits else None
        logits = (number_text(found.logits), number_text(LIMIT), "" if bits is None else f"{bits:.1f}")
        table.add_row(say["logits"], "", "", *logits)
    return table


def _layers(found: Certificate) -> Table:
    """Every layer: the tightest site fixed and stock, each bound as float16 stores it, and the exponents."""
    say = CERTIFY_TEXTS[found.language]
    exponents = ["exponents"] if found.scaled_layers else []  # most checkpoints need none
    table = _table(say, "layer", "fixed", "bound", "bits", *exponents, "stock", "bound", "bits", gap=0)
    for layer in found.layers:
        if not layer.bounds:
            table.add_row(str(layer.layer), say["unbounded"])
            continue
        row = [str(layer.layer)]
        for stock in (False, True):
            place = tightest(layer, stock)
            bound, _, bits = _scale(found, place)
            row += [place.site, bound, bits]
        raised = "\n".join(f"{name} {exponent}" for name, exponent in layer.exponents.items() if exponent)
        table.add_row(*row[:4], *([raised or "0"] if exponents else []), *row[4:])
    return table


def _tensors(found: Certificate) -> Table:
    """Every tensor with a weight that the cast to float16 changes, and how many of its weights."""
    kinds = [kind for kind in CAST if any(lost.get(kind) for lost in found.casting.values())]
    table = _table(CERTIFY_TEXTS[found.language], "tensor", *kinds, "total")
    for name, lost in found.casting.items():
        table.add_row(name, *(number_text(lost.get(kind, 0)) for kind in (*kinds, "total")))
    return table


def _table(say: dict[str, str], *columns: str, gap: int = 1) -> Table:
    """A table that cuts nothing off: on a narrow terminal a cell continues in the next line.

    gap: blanks between columns, beside the one that is always there.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, gap, 0, 0))
    for name in columns:
        left = name in ("what", "site", "fixed", "stock", "exponents", "tensor")
        table.add_column(say[f"column.{name}"], justify="left" if left else "right", overflow="fold")
    return table


def _scale(found: Certificate, place: Tightest) -> tuple[str, str, str]:
    """A bound, its limit and the bits between them, as text."""
    bits = CERTIFY_TEXTS[found.language]["none"] if place.bits is None else f"{place.bits:.1f}"
    return number_text(place.stored, found.language), number_text(place.limit), bits


def _order(bits: float | None) -> float:
    return -math.inf if bits is None else bits


def _stock(found: Certificate) -> Iterator[str]:
    """What the bounds say of the stock model."""
    say, layers = CERTIFY_TEXTS[found.language], found.layers
    over = [layer.layer for layer in layers if not layer.stock_proven]
    if layers and not over:
        yield say["stock_proven" if found.proven else "stock_layers_proven"]
    elif layers:
        yield say["stock_unproven"].format(count=len(over), layers=len(layers))


def _exponents(found: Certificate) -> Iterator[str]:
    """Which layers are scaled."""
    scaled = [layer.layer for layer in found.layers if max(layer.exponents.values(), default=0)]
    if scaled:
        text = CERTIFY_TEXTS[found.language]["scaled"]
        yield text.format(layers=ranges(scaled), most=found.max_exponent)


def _cast(found: Certificate) -> Iterator[str]:
    """What the cast to float16 changes, summed over the tensors."""
    say, total = CERTIFY_TEXTS[found.language], Counter[str]()
    for lost in found.casting.values():
        total.update(lost)
    parts = [f"{number_text(total[kind])} {say[f'cast.{kind}']}" for kind in CAST if total[kind]]
    yield say["cast"].format(parts=say["separator"].join(parts)) if parts else say["cast.exact"]


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as text: 0-3, 7, 26-27."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def verdict_of(reasons: list[str], assumed: Assumptions, layers: list[LayerCertificate], language: str = "en") -> str:
    """The result in one sentence."""
    say = CERTIFY_TEXTS[language]
    if reasons:
        more = len(reasons) - 1
        return say["unproven_more" if more else "unproven"].format(reason=reasons[0], more=more)
    dropout = "".join(say["dropout"].format(sentence=sentence) for sentence in assumed.dropouts)
    return say["proven"].format(positions=number_text(assumed.positions), layers=len(layers), dropout=dropout)


def unproven_reason(site: str, planned: PlannedLayer) -> str:
    """Why a site of a layer is not proven."""
    bound = asdict(planned.bounds)[site]
    if not math.isfinite(bound):
        return f"{site} has no finite bound"
    missing = -headroom_bits(planned.bounds, planned.exponents)[site]
    return f"{site} is bounded by {number_text(bound)} only, {missing:.1f} bits too large for the largest exponent"
