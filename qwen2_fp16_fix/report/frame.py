"""The common parts of a report's charts: a figure with its words, its layout and its axes."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from ..scanning.result import ScanResult
from ..translations import SCAN_TEXTS as TEXTS
from .style import STAND_INS, colour_of, log_ticks


class Chart(NamedTuple):
    """A figure with its title and caption. spoken: the text for a screen reader."""

    id: str
    title: str
    caption: str
    spoken: str
    figure: go.Figure
    height: int


def layout(height: int, **more: Any) -> go.Layout:
    """The common layout of all figures: no background, the page's type and colours, a legend above."""
    axis = {
        "gridcolor": STAND_INS["line"],
        "linecolor": STAND_INS["line"],
        "zeroline": False,
        "automargin": True,
        "fixedrange": True,
        "title_standoff": 8,
    }
    shared: dict[str, Any] = {
        "template": None,
        "height": height,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, 'Noto Sans CJK SC', sans-serif", "size": 12, "color": STAND_INS["ink"]},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"bgcolor": STAND_INS["panel"], "font": {"color": STAND_INS["ink"]}},
        "dragmode": False,
    }
    axes = {name: {**axis, **more.pop(name, {})} for name in ("xaxis", "yaxis")}
    return go.Layout(**{**shared, **axes, **more})


def marker(scan: ScanResult, size: float = 15) -> dict[str, Any]:
    """An open ring for stock, a small square for fixed: both can be seen in one place."""
    if scan.settings.fixed:
        return {"color": colour_of(scan), "symbol": "square", "size": size / 2}
    return {"color": colour_of(scan), "symbol": "circle-open", "size": size, "line": {"width": size / 6}}


def layer_axis(lang: str, count: int) -> dict[str, Any]:
    """An axis of layers, with whole numbers only."""
    step = max(1, math.ceil(count / 14))
    return {
        "title_text": TEXTS[lang]["axis_layer"],
        "range": [-0.5, count - 0.5],
        "tickvals": list(range(0, count, step)),
        "showgrid": False,
    }


def log_axis(title: str, values: Sequence[float | None], form: str) -> dict[str, Any]:
    """A logarithmic axis for the values."""
    low, high, inside = log_ticks(values)
    labels = [format(tick, form) for tick in inside]
    return {"type": "log", "title_text": title, "range": [low, high], "tickvals": inside, "ticktext": labels}


def add_limit(figure: go.Figure, value: float, text: str, layers: int) -> None:
    """A dashed line across, named in the legend."""
    figure.add_scatter(
        x=[-0.5, layers - 0.5],
        y=[value, value],
        mode="lines",
        name=text,
        line={"color": STAND_INS["bad"], "width": 2, "dash": "dash"},
        hoverinfo="skip",
    )
