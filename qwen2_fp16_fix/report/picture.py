"""The picture: verdict, headroom by layer and site, and the residual stream, as a PNG for papers and chats."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator

from ..activations.sites import SITES
from ..errors import ScanError
from ..patches.range_plan import FLOAT16_MAX
from ..scanning.result import ScanResult
from ..scanning.sentences import site_name, verdict
from ..translations import SCAN_TEXTS as TEXTS
from .style import BANDS, PALETTE, band_of, bits_text, cells_of, kind_of, layer_numbers, log_ticks, residuals, scan_name

#: Fonts with Chinese letters, as Linux, macOS and Windows call theirs.
CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",  # the same letters: one file holds all of them, and matplotlib reads the first name
    "Noto Sans SC",
    "Source Han Sans SC",
    "PingFang SC",
    "Heiti SC",
    "Microsoft YaHei",
    "SimHei",
    "WenQuanYi Zen Hei",
)
MARKERS = ("o", "s")


def fonts(lang: str) -> list[str]:
    """The fonts to draw with. Raises ScanError if none here has Chinese letters."""
    plain = ["DejaVu Sans"]
    if lang != "zh":
        return plain
    installed = {font.name for font in font_manager.fontManager.ttflist}
    found = [name for name in CHINESE_FONTS if name in installed]
    if not found:
        raise ScanError("no font here has Chinese letters for the PNG: install Noto Sans CJK, or use --lang en.")
    return [*found[:1], *plain]


def draw(scans: Sequence[ScanResult], path: Path, lang: str = "en") -> None:
    """Writes the picture of one scan, or of stock's and fixed's, with the verdicts as its description."""
    layers = scans[0].model["layers"]
    height = 4.6 + 0.24 * max(layers, 6)
    with matplotlib.rc_context({"font.family": fonts(lang), "font.size": 9, "axes.unicode_minus": False}):
        figure = Figure(figsize=(10, height), dpi=160, layout="constrained", facecolor="white")
        top, bottom = figure.subplots(2, 1, height_ratios=[0.24 * max(layers, 6) + 0.6, 2.2])
        signs = [("✓ " if scan.finite else "✗ ") + verdict(scan, lang) for scan in scans]
        title = "\n".join(_wrapped(sign, lang) for sign in signs)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, parse_math=False)  # a token may be a dollar sign
        _headroom(top, scans[0], lang)
        _residual(bottom, scans, lang)
        # The description is for readers who cannot see the picture.
        figure.savefig(path, format="png", metadata={"Description": "\n".join(signs)})


def _wrapped(text: str, lang: str) -> str:
    return "\n    ".join(textwrap.wrap(text, 62 if lang == "zh" else 112, break_long_words=lang == "zh"))


def _headroom(axes: Axes, scan: ScanResult, lang: str) -> None:
    texts, layers, cells = TEXTS[lang], layer_numbers(scan), cells_of(scan)
    colours = ListedColormap([colours["light"] for _, colours in BANDS])
    bands = [[float("nan") if (band := band_of(cell)) is None else band for cell in row] for row in cells]
    axes.imshow(bands, cmap=colours, vmin=0, vmax=len(BANDS), aspect="auto")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            ink = "white" if cell and cell.past_limit else PALETTE["ink"]["light"]
            axes.text(x, y, bits_text(cell), ha="center", va="center", fontsize=7, color=ink)
    axes.hlines([edge - 0.5 for edge in range(1, len(layers))], -0.5, len(SITES) - 0.5, color="white", linewidth=2)
    axes.vlines([edge - 0.5 for edge in range(1, len(SITES))], -0.5, len(layers) - 0.5, color="white", linewidth=2)
    first = scan.first_nonfinite
    if first is not None and first.layer is not None:
        corner = (list(SITES).index(first.site) - 0.5, layers.index(first.layer) - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=PALETTE["ink"]["light"], linewidth=2.5, zorder=3))
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(len(SITES)), [site_name(name, lang) for name in SITES], rotation=35, ha="right")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_ylabel(texts["axis_layer"])
    title = f"{texts['map_title'].format(scan=scan_name(scan, lang))} · {texts['headroom_bits']}"
    axes.set_title(title, loc="left", fontsize=9)
    axes.tick_params(length=0)


def _residual(axes: Axes, scans: Sequence[ScanResult], lang: str) -> None:
    texts = TEXTS[lang]
    for index, scan in enumerate(scans):
        points = residuals(scan)
        colour = PALETTE[kind_of(scan)]["light"]
        axes.plot(
            [site.layer or 0 for site in points],
            [float("nan") if site.largest is None else site.largest for site in points],
            marker=MARKERS[index],
            markersize=(9, 5)[index],
            fillstyle=("none", "full")[index],
            linestyle=("-", "--")[index],
            color=colour,
            label=scan_name(scan, lang),
        )
    axes.axhline(FLOAT16_MAX, color=PALETTE["bad"]["light"], linestyle=":", label=texts["float16_ends"])
    low, high, ticks = log_ticks([*(site.largest for scan in scans for site in residuals(scan)), FLOAT16_MAX])
    axes.set_yscale("log")
    axes.set_ylim(10**low, 10**high)
    axes.set_yticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(texts["axis_layer"])
    axes.set_title(texts["residual_title"], loc="left", fontsize=9)
    axes.grid(color=PALETTE["line"]["light"])
    axes.legend(frameon=False, loc="best")
