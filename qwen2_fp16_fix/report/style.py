"""The style of a report, for its page and its picture: colours by theme, bands of headroom, marks, names and ticks."""

import math
import re
from collections.abc import Sequence
from html import escape

from ..activations.sites import SITES
from ..scanning.result import MeasuredSite, ScanResult
from ..scanning.sentences import number, place_name
from ..translations import SCAN_TEXTS as TEXTS

#: Stand-ins for colours that differ by theme: plotly wants colours, the page replaces these by its own.
PALETTE = {
    "ground": {"light": "#f6f7f9", "dark": "#101418"},
    "panel": {"light": "#ffffff", "dark": "#181e25"},
    "line": {"light": "#dde2e8", "dark": "#313a45"},
    "ink": {"light": "#18212c", "dark": "#e8edf2"},
    "muted": {"light": "#56616e", "dark": "#a3b0bd"},
    "link": {"light": "#0b57d0", "dark": "#8ab4f8"},
    "bad": {"light": "#b3261e", "dark": "#ff8a80"},
    "good": {"light": "#0f6e56", "dark": "#5fd0ae"},
    "stock": {"light": "#c2410c", "dark": "#fb923c"},
    "fixed": {"light": "#0f6e8c", "dark": "#56c4e8"},
    "third": {"light": "#7c3aed", "dark": "#b79cff"},
    "fourth": {"light": "#64748b", "dark": "#94a3b8"},
}
STAND_INS = {name: f"#0000{index:02x}" for index, name in enumerate(PALETTE, start=1)}
#: Headroom in bits from the lower edge of a band on, with its colour by theme: red past the limit, then less and less.
BANDS = (
    (-math.inf, {"light": "#a50f15", "dark": "#e0443e"}),
    (0.0, {"light": "#fb9a4b", "dark": "#b8621b"}),
    (2.0, {"light": "#fdd49e", "dark": "#806434"}),
    (4.0, {"light": "#d9e8f3", "dark": "#3d5568"}),
    (8.0, {"light": "#eef4f8", "dark": "#28343f"}),
)
BAND_STAND_INS = [f"#0001{index:02x}" for index in range(len(BANDS))]
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up")


def stand_ins() -> dict[str, dict[str, str]]:
    """The colours by theme that the page puts in place of each stand-in."""
    return {STAND_INS[name]: colours for name, colours in PALETTE.items()} | dict(
        zip(BAND_STAND_INS, (colours for _, colours in BANDS), strict=True)
    )


def kind_of(scan: ScanResult) -> str:
    """The key of a scan's colour and of its name: "fixed" or "stock"."""
    return "fixed" if scan.settings.fixed else "stock"


def scan_name(scan: ScanResult, lang: str) -> str:
    """The name of a scan in a legend."""
    return TEXTS[lang][kind_of(scan)]


def colour_of(scan: ScanResult) -> str:
    """A scan's colour, the same in every figure."""
    return STAND_INS[kind_of(scan)]


def layer_numbers(scan: ScanResult) -> list[int]:
    """The numbers of the layers."""
    return sorted({site.layer for site in scan.sites if site.layer is not None})


def cells_of(scan: ScanResult) -> list[list[MeasuredSite | None]]:
    """The cells of a map of headroom: a row for each layer, a column for each of SITES; None if not measured."""
    by_place = {(site.layer, site.site): site for site in scan.sites}
    return [[by_place.get((layer, name)) for name in SITES] for layer in layer_numbers(scan)]


def residuals(scan: ScanResult) -> list[MeasuredSite]:
    """The residual stream after each layer."""
    return [site for site in scan.sites if site.site == "residual"]


def band_of(cell: MeasuredSite | None) -> float | None:
    """The middle of a site's band, by number; None for a site that is not stored."""
    if cell is None or (cell.stored_as is None and not cell.past_limit):
        return None
    bits = -1.0 if cell.headroom_bits is None else cell.headroom_bits
    return sum(bits >= edge for edge, _ in BANDS) - 0.5


def bits_text(cell: MeasuredSite | None) -> str:
    """The text of a cell of the map: bits, with a cross past the limit; fp32; or – if nothing is stored."""
    if cell is None or cell.stored_as is None:
        return "–"
    if cell.headroom_bits is None:
        return "✗"
    if cell.stored_as == "float32":
        return "fp32"
    bits = f"{cell.headroom_bits:.1f}".replace("-", "−")
    return f"✗ {bits}" if cell.past_limit else bits


def hover_text(cell: MeasuredSite | None, lang: str) -> str:
    """A site's place and its largest, for a pointer, as HTML: plotly takes tags and entities in it for markup."""
    if cell is None:
        return ""
    place = re.sub("`([^`]+)`", r"\1", place_name(cell, lang))
    return f"{escape(place, quote=False)}<br>{number(cell.largest, lang)}"


def log_ticks(values: Sequence[float | None]) -> tuple[float, float, list[float]]:
    """The range of a logarithmic axis, in powers of ten, and ticks at round multiples of them, few enough to fit."""
    known = [value for value in values if value]
    low, high = math.log10(min(known, default=1)) - 0.1, math.log10(max(known, default=10)) + 0.1
    steps = (1,) if high - low > 3 else (1, 2, 5) if high - low > 0.7 else range(1, 10)
    ticks = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    return low, high, [tick for tick in ticks if low <= math.log10(tick) <= high]
