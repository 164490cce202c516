"""matplotlib for a report: a figure of our own settings, its fonts, and a chart as SVG inside the page."""

import io
import re
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure

from ..errors import ScanError
from .charts import Chart, Pen
from .style import PALETTE

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
PLAIN = "DejaVu Sans"  # comes with matplotlib
#: Stands for a colour while matplotlib draws, which takes no CSS variables.
STAND_INS = {name: f"#0000{index:02x}" for index, name in enumerate(PALETTE, start=1)}
#: The widths of a chart on the page, in CSS pixels at which its letters have their size: on a desk, on a phone.
WIDTHS = {"wide": 960, "narrow": 360}
LINE = 15  # pixels in a line of text
_LOCK = threading.Lock()


def fonts(lang: str) -> list[str]:
    """The fonts to draw with. Raises ScanError if none here has Chinese letters."""
    if lang != "zh":
        return [PLAIN]
    found = _chinese_font()
    if found is None:  # matplotlib keeps a list, which lacks fonts that were installed since
        known = {font.fname for font in font_manager.fontManager.ttflist}
        for file in font_manager.findSystemFonts():
            if file not in known:
                _add_font(file)
        found = _chinese_font()
    if found is None:
        raise ScanError("no font here has Chinese letters for the PNG: install Noto Sans CJK, or use --lang en.")
    return [found, PLAIN]


def _chinese_font() -> str | None:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in CHINESE_FONTS if name in installed), None)


def _add_font(file: str) -> None:
    try:
        font_manager.fontManager.addfont(file)
    except (OSError, RuntimeError):  # not a font that matplotlib can read
        return


@contextmanager
def settings(families: list[str], size: float) -> Iterator[None]:
    """matplotlib's own defaults with this font, for one thread at a time. Its settings belong to the process."""
    with _LOCK, matplotlib.rc_context():
        matplotlib.rcdefaults()
        chosen: dict[Any, Any] = {
            "font.family": families,
            "font.size": size,
            "svg.fonttype": "none",
            "svg.hashsalt": "page",
        }
        matplotlib.rcParams.update(chosen)
        yield


def svgs(chart: Chart, lang: str, classes: dict[str, str]) -> dict[str, str]:
    """A chart as SVG elements by the name of their width, in the page's own colours and letters.

    classes: the names of the CSS classes by their style; the styles of this chart are added.
    """
    return {name: _svg(chart, lang, name, classes) for name in WIDTHS}


def _svg(chart: Chart, lang: str, width: str, classes: dict[str, str]) -> str:
    stand_ins: dict[str, str] = {}

    def word(text: str) -> str:
        """ASCII of about the same width for a text that the drawing font may lack; put back below."""
        if text.isascii():
            return text
        stand_in = f"@{len(stand_ins):02d}".ljust(round(_ems(text) / 0.62), "n")
        stand_ins[stand_in] = text
        return stand_in

    with settings([PLAIN], 12):
        figure = Figure(figsize=(WIDTHS[width] / 72, chart.rows * LINE / 72), layout="constrained", facecolor="none")
        chart.draw(figure.subplots(), Pen(lang, STAND_INS, word, narrow=width == "narrow"))
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    drawn = _compact(written.getvalue(), f"{chart.id}-{width}", classes)
    for stand_in, text in stand_ins.items():
        drawn = drawn.replace(stand_in, escape(text, quote=False))
    return drawn


def _ems(text: str) -> float:
    """The width of a text in ems."""
    return sum(1.0 if unicodedata.east_asian_width(letter) in "WF" else 0.62 for letter in text)


def _compact(svg: str, prefix: str, classes: dict[str, str]) -> str:
    """An SVG without what a page does not need: namespaces, comments, clipping, groups, digits below 0.1 px.

    Styles become classes. prefix: makes the ids of marks unique on the page.
    """
    svg = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    root = ElementTree.fromstring(re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href"))
    marks = {element.get("href", "").removeprefix("#") for element in root.iter("use")}
    for element in root.iter():
        _shorten(element, prefix, marks, classes)
    _dissolve(root)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("aria-hidden", "true")
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode"))


def _shorten(element: ElementTree.Element, prefix: str, marks: set[str], classes: dict[str, str]) -> None:
    attributes = element.attrib
    name = attributes.pop("id", None)
    if name in marks:
        attributes["id"] = f"{prefix}-{name}"
    if "href" in attributes:
        attributes["href"] = attributes["href"].replace("#", f"#{prefix}-")
    attributes.pop("clip-path", None)  # every chart's numbers lie within its axes
    if attributes.get("transform", "").startswith("rotate(-0 "):
        del attributes["transform"]
    for key in {"d", "x", "y", "transform"} & attributes.keys():
        rounded = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), attributes[key])
        attributes[key] = re.sub(r"\s+", " ", rounded).strip()
    style = attributes.pop("style", None)
    if style is not None:
        attributes["class"] = classes.setdefault(_page_style(style), f"c{len(classes)}")


def _page_style(style: str) -> str:
    """A style of matplotlib's in the page's own letters and colours."""
    style = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", re.sub(r"font-family: [^;]*;? ?", "", style))
    for name, colour in STAND_INS.items():
        style = style.replace(colour, f"var(--{name})")
    return style.strip(" ;")


def _dissolve(element: ElementTree.Element) -> None:
    """Puts the children of groups that say nothing in their place, and drops what is empty."""
    for index, child in reversed(list(enumerate(element))):
        _dissolve(child)
        if child.tag == "clipPath" or (child.tag in ("g", "defs") and not len(child)):
            del element[index]
        elif child.tag == "g" and not child.attrib:
            element[index : index + 1] = list(child)
