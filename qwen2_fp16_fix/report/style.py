"""The style of a report, for its page and its picture: words, colours by theme, bands of headroom, names and ticks."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..activations.sites import SITES
from ..scanning.result import MeasuredSite, ScanResult
from ..translations import REPORT_TEXTS, SCAN_TEXTS

#: The texts of the report, and those of the scan that it repeats, by language.
TEXTS: Mapping[str, Mapping[str, str]] = {lang: SCAN_TEXTS[lang] | REPORT_TEXTS[lang] for lang in REPORT_TEXTS}
#: Colours by theme. The page has them as CSS variables of these names; the picture takes the light ones.
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
LIGHT = {name: colours["light"] for name, colours in PALETTE.items()}


class Band(NamedTuple):
    """Cells of a map of headroom that share a colour: those with at least `low` bits, or those kept in fp32."""

    name: str
    low: float
    light: str
    dark: str
    light_ink: str = LIGHT["ink"]
    dark_ink: str = PALETTE["ink"]["dark"]


#: From red, which is over the limit, to pale, which is far below it; and green for what is kept in fp32.
BANDS = (
    Band("over", -math.inf, "#a50f15", "#c92f2a", "#ffffff", "#ffffff"),
    Band("b0", 0.0, "#fb9a4b", "#9a4e12"),
    Band("b2", 2.0, "#fdd49e", "#6b522a"),
    Band("b4", 4.0, "#d9e8f3", "#33495c"),
    Band("b8", 8.0, "#eef4f8", "#26313b"),
)
FP32 = Band("fp32", math.inf, "#d3eee2", "#1c4a3b")


def kind_of(scan: ScanResult) -> str:
    """The key of a scan's colour and of its name: "fixed" or "stock"."""
    return "fixed" if scan.settings.fixed else "stock"


def scan_name(scan: ScanResult, lang: str) -> str:
    """The name of a scan in a legend."""
    return TEXTS[lang][kind_of(scan)]


def model_name(checkpoint: str) -> str:
    """The name of a checkpoint: OWNER/NAME for one in the Hub's cache, else its folder's name, of "." too.

    Bytes that are not UTF-8 are replaced, as the page and the picture are UTF-8.
    """
    path = os.path.realpath(checkpoint)
    parent = os.path.dirname(path)
    if os.path.basename(parent) == "snapshots":  # …/models--OWNER--NAME/snapshots/REVISION
        name = os.path.basename(os.path.dirname(parent)).removeprefix("models--").replace("--", "/")
        name = f"{name}@{os.path.basename(path)[:7]}"
    else:
        name = os.path.basename(path)
    return name.encode("utf-8", "replace").decode()


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


def band_of(cell: MeasuredSite | None) -> Band | None:
    """A site's band; None for a site that is not stored."""
    if cell is None or (cell.stored_as is None and not cell.past_limit):
        return None
    if cell.stored_as == "float32" and not cell.past_limit:
        return FP32
    bits = -1.0 if cell.headroom_bits is None else cell.headroom_bits
    return max((band for band in BANDS if bits >= band.low), key=lambda band: band.low)


def bits_text(cell: MeasuredSite | None) -> str:
    """The text of a cell of the map: bits; ✗ for what is not finite; fp32; or – if nothing is stored."""
    if cell is None or cell.stored_as is None:
        return "–"
    if cell.headroom_bits is None:
        return "✗"
    return "fp32" if cell.stored_as == "float32" else signed(cell.headroom_bits)


def signed(bits: float) -> str:
    """Bits with one digit and a true minus. A number that is barely over the limit does not read as 0."""
    shown = f"{bits:.1f}".replace("-", "−")
    return "<0" if shown == "−0.0" else shown


def log_ticks(values: Sequence[float | None]) -> tuple[float, float, list[float]]:
    """The range of a logarithmic axis, in powers of ten, and ticks at round multiples of them, few enough to fit."""
    known = [value for value in values if value]
    low, high = math.log10(min(known, default=1)), math.log10(max(known, default=10))
    margin = max(0.1, 0.05 * (high - low))
    low, high = low - margin, high + margin
    steps = (1,) if high - low > 3 else (1, 2, 5) if high - low > 0.4 else range(1, 10)
    ticks = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    return low, high, [tick for tick in ticks if low <= math.log10(tick) <= high]
