"""The picture: verdict, headroom of stock and fixed side by side, and the residual stream, as a PNG."""

import io
import math
import textwrap
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..activations.sites import SITES
from ..scanning.result import ScanResult
from ..scanning.sentences import site_name, verdict
from .card import headline, place_words
from .charts import Pen, residual_stream
from .drawing import fonts, settings
from .style import BANDS, FP32, LIGHT, TEXTS, Band, band_of, bits_text, cells_of, layer_numbers, model_name, scan_name

WIDTH, DPI = 7.0, 200  # inches: a page shows it 700 pixels wide, where its letters are 11 pixels high
COLOURS = 128  # enough for text with soft edges; the file is a third of one with all colours
NUMBERED = 8  # layers up to which a cell has room for its number


def draw(scans: Sequence[ScanResult], path: Path, lang: str = "en") -> None:
    """Writes the picture of one scan, or of stock's and fixed's, with the verdicts as its description."""
    written = io.BytesIO()
    with settings(fonts(lang), 8):
        layout = ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.06)
        figure = Figure(figsize=(WIDTH, 6.7), layout=layout, facecolor="white")
        parts: Any = figure.subfigures(3, 1, height_ratios=[0.95, 3.4, 2.4])
        head, maps, stream = parts
        _head(head, scans, lang)
        for axes, scan in zip(maps.subplots(1, len(scans), sharey=True, squeeze=False)[0], scans, strict=True):
            _headroom(axes, scan, lang)
        _legend(maps, lang)
        residual_stream(stream.subplots(), scans, Pen(lang, LIGHT, lambda text: text))
        stream.suptitle(TEXTS[lang]["residual_title"], x=0.01, ha="left", fontsize=8, fontweight="bold")
        figure.savefig(written, format="png", dpi=DPI)
    image = Image.open(written).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    signs = [("✓ " if scan.finite else "✗ ") + verdict(scan, lang) for scan in scans]
    described = PngInfo()
    described.add_itxt("Description", "\n".join(signs))  # for readers who cannot see the picture
    image.save(path, format="PNG", optimize=True, dpi=(DPI, DPI), pnginfo=described)


def _head(figure: SubFigure, scans: Sequence[ScanResult], lang: str) -> None:
    """The model, the verdict, and what ran when. parse_math is off, as a name or a token may hold a dollar sign."""
    first = scans[0]
    lines: tuple[tuple[float, str, dict[str, Any]], ...] = (
        (0.93, model_name(first.checkpoint), {"fontsize": 11, "fontweight": "bold", "color": LIGHT["ink"]}),
        (
            0.68,
            " ".join(text for text, _ in headline(scans, lang)),
            {"fontsize": 10, "fontweight": "bold"},
        ),
        (0.44, _wrapped(place_words(scans, lang).replace("`", ""), lang), {"fontsize": 7.5, "color": LIGHT["ink"]}),
        (0.12, facts(first, lang), {"fontsize": 7, "color": LIGHT["muted"]}),
    )
    for y, text, style in lines:
        figure.text(0.01, y, text, parse_math=False, va="top", **style)


def facts(scan: ScanResult, lang: str) -> str:
    """What ran, in a line: dtype, attention, versions, date."""
    found = scan.versions
    ran = TEXTS[lang]["ran_on"].format(attention=scan.settings.attention, layers=scan.model["layers"])
    names = (f"qwen2-fp16-fix {found.package}", f"transformers {found.transformers}", f"torch {found.torch}")
    return " · ".join((ran, *names, time.strftime("%Y-%m-%d")))


def _wrapped(text: str, lang: str) -> str:
    return "\n".join(textwrap.wrap(text, 62 if lang == "zh" else 122, break_long_words=lang == "zh"))


def _headroom(axes: Axes, scan: ScanResult, lang: str) -> None:
    """A row for each site, a column for each layer, so that the names of sites are read without turning the head."""
    layers, cells = layer_numbers(scan), list(zip(*cells_of(scan), strict=True))
    every: tuple[Band, ...] = (*BANDS, FP32)
    bands = [[math.nan if (band := band_of(cell)) is None else every.index(band) for cell in row] for row in cells]
    colours = ListedColormap([band.light for band in every])
    axes.imshow(bands, cmap=colours, vmin=-0.5, vmax=len(every) - 0.5, aspect="auto", interpolation="nearest")
    if len(layers) <= NUMBERED:
        for y, row in enumerate(cells):
            for x, cell in enumerate(row):
                band = band_of(cell)
                ink = LIGHT["muted"] if band is None else band.light_ink
                axes.text(x, y, bits_text(cell), ha="center", va="center", fontsize=7, color=ink)
    axes.hlines([edge - 0.5 for edge in range(1, len(SITES))], -0.5, len(layers) - 0.5, color="white", linewidth=1.2)
    if len(layers) <= 40:
        axes.vlines([edge - 0.5 for edge in range(1, len(layers))], -0.5, len(SITES) - 0.5, color="white", linewidth=1)
    first = scan.first_nonfinite
    if first is not None and first.layer is not None:
        corner = (layers.index(first.layer) - 0.5, list(SITES).index(first.site) - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=LIGHT["ink"], linewidth=1.8, zorder=3))
    step = max(1, math.ceil(len(layers) / 10))
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_yticks(range(len(SITES)), [site_name(name, lang) for name in SITES])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel(TEXTS[lang]["axis_layer"], color=LIGHT["muted"])
    title = TEXTS[lang]["map_of"].format(scan=scan_name(scan, lang))
    axes.set_title(title, loc="left", fontsize=8, fontweight="bold")


def _legend(figure: SubFigure, lang: str) -> None:
    handles = [Patch(facecolor=band.light, edgecolor=LIGHT["line"], label=text) for band, text in band_names(lang)]
    tight = {"handlelength": 1.3, "handletextpad": 0.5, "columnspacing": 1.4}
    handles.append(Patch(facecolor="none", edgecolor="none", label=f"– {TEXTS[lang]['band_none']}"))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=7, **tight)


def band_names(lang: str) -> list[tuple[Band, str]]:
    """The bands with their names in a legend."""
    texts = TEXTS[lang]
    lows = [f"{band.low:g}" for band in BANDS[1:]]
    ranges = [texts["band_range"].format(low=low, high=high) for low, high in pairwise(lows)]
    names = [texts["band_over"], *ranges, texts["band_more"].format(low=lows[-1]), texts["band_fp32"]]
    return list(zip((*BANDS, FP32), names, strict=True))
