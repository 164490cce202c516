"""Headroom in charts: layer by site, and stock against fixed."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from ..activations.sites import SITES
from ..scanning.result import ScanResult
from ..scanning.sentences import place_name, site_name
from ..translations import SCAN_TEXTS as TEXTS
from .frame import Chart, layout, marker
from .style import BAND_STAND_INS, BANDS, STAND_INS, band_of, bits_text, cells_of, hover_text, layer_numbers, scan_name

LEAST, MOST = -4.0, 16.0  # bits that a dot can show; fp32 has more


def headroom_map(scan: ScanResult, lang: str) -> Chart:
    """Layer × site: bits below the limit, in bands, with the number in each cell and a cross past the limit."""
    texts, layers, cells = TEXTS[lang], layer_numbers(scan), cells_of(scan)
    row_height = 24 if len(layers) <= 40 else 16
    below = 120 if lang == "en" else 80  # for the slanted names
    height = 116 + below + row_height * len(layers)
    figure = go.Figure(
        go.Heatmap(
            x=[site_name(name, lang) for name in SITES],
            y=[str(layer) for layer in layers],
            z=[[band_of(cell) for cell in row] for row in cells],
            text=[[bits_text(cell) for cell in row] for row in cells],
            meta={"short": [["✗" if cell and cell.past_limit else "" for cell in row] for row in cells]},
            hovertext=[[hover_text(cell, lang) for cell in row] for row in cells],
            hoverinfo="text",
            texttemplate="%{text}",
            xgap=2,
            ygap=2,
            zmin=0,
            zmax=len(BANDS),
            colorscale=_steps(),
            colorbar={
                "orientation": "h",
                "thickness": 12,
                "len": 0.8,
                "y": 1.0,
                "yanchor": "bottom",
                "title": {"text": texts["headroom_bits"], "side": "top"},
                "tickvals": list(range(1, len(BANDS))),
                "ticktext": [f"{edge:g}" for edge, _ in BANDS[1:]],
                "outlinewidth": 0,
            },
        ),
        layout(
            height,
            margin={"l": 8, "r": 8, "t": 8, "b": below},
            xaxis={"tickangle": -45, "showgrid": False, "automargin": False},
            yaxis={"autorange": "reversed", "showgrid": False, "title_text": texts["axis_layer"], "type": "category"},
        ),
    )
    _outline_first(figure, scan, layers)
    past = sum(cell is not None and cell.past_limit for row in cells for cell in row)
    tight = place_name(scan.tightest, lang)
    spoken = texts["map_spoken"].format(past=past, place=tight)
    title = texts["map_title"].format(scan=scan_name(scan, lang))
    return Chart("chart-headroom", title, texts["map_caption"], spoken, figure, height)


def _steps() -> list[list[Any]]:
    """The bands as a colour scale with edges instead of ramps, all of the same width."""
    count = len(BANDS)
    return [[(index + side) / count, colour] for index, colour in enumerate(BAND_STAND_INS) for side in (0, 1)]


def _outline_first(figure: go.Figure, scan: ScanResult, layers: Sequence[int]) -> None:
    """A frame around the cell that breaks first."""
    first = scan.first_nonfinite
    if first is not None and first.layer is not None:
        x, y = list(SITES).index(first.site), layers.index(first.layer)
        line = {"color": STAND_INS["ink"], "width": 3}
        figure.add_shape(type="rect", x0=x - 0.5, x1=x + 0.5, y0=y - 0.5, y1=y + 0.5, line=line)


def stock_against_fixed(scans: Sequence[ScanResult], lang: str) -> Chart:
    """The least headroom of each site over all layers, stock beside fixed; fp32 is at the right edge."""
    texts, names = TEXTS[lang], list(reversed(SITES))
    height = 90 + 26 * len(names)
    figure = go.Figure(
        layout=layout(
            height,
            xaxis={
                "title_text": texts["headroom_bits"],
                "range": [-4.5, 17.5],
                "tickvals": [-4, 0, 4, 8, 12, 16],
                "ticktext": ["−4", "0", "4", "8", "12", texts["fp32_edge"]],
            },
            yaxis={"type": "category"},
        )
    )
    ends = [least_headroom(scan) for scan in scans]
    for name in names:
        pair = [end.get(name) for end in ends]
        if None not in pair:
            figure.add_scatter(
                x=pair,
                y=[site_name(name, lang)] * 2,
                mode="lines",
                line={"color": STAND_INS["line"], "width": 4},
                showlegend=False,
                hoverinfo="skip",
            )
    for scan, end in zip(scans, ends, strict=True):
        seen = [name for name in names if end.get(name) is not None]
        figure.add_scatter(
            x=[end[name] for name in seen],
            y=[site_name(name, lang) for name in seen],
            mode="markers",
            name=scan_name(scan, lang),
            marker=marker(scan),
            hovertemplate="%{y}: %{x:.1f}",
        )
    figure.add_vline(x=0, line={"color": STAND_INS["bad"], "width": 1.5, "dash": "dash"})
    past = [sum(bits is not None and bits < 0 for bits in end.values()) for end in ends]
    spoken = texts["against_spoken"].format(stock=past[0], fixed=past[1])
    return Chart("chart-against", texts["against_title"], texts["against_caption"], spoken, figure, height)


def least_headroom(scan: ScanResult) -> dict[str, float]:
    """The least headroom of each site over the layers. MOST stands for fp32 and for sites that are not stored."""
    found: dict[str, float] = {}
    for site in scan.sites:
        if site.site in SITES:
            bits = LEAST if site.headroom_bits is None else site.headroom_bits
            found[site.site] = min(found.get(site.site, MOST), max(bits, LEAST))
    return found
