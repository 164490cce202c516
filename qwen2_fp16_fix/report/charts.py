"""The charts of a report, as figures of plotly. Colours are stand-ins, which the page fills in by theme."""

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from ..patches.range_plan import FLOAT16_MAX
from ..scanning.measurements import LINEAR_INPUTS
from ..scanning.result import ScanResult
from ..scanning.sentences import bias_text, number, spikes_text
from ..translations import SCAN_TEXTS as TEXTS
from .frame import Chart, add_limit, layer_axis, layout, log_axis, marker
from .headroom import headroom_map, stock_against_fixed
from .style import DASHES, STAND_INS, SYMBOLS, colour_of, hover_text, layer_numbers, residuals, scan_name

LEAST_LOSS = 1e-4  # a smaller loss is drawn as this


def charts(scans: Sequence[ScanResult], lang: str) -> list[Chart]:
    """The charts for one scan, or for a stock and a fixed one."""
    found = [headroom_map(scans[0], lang), residual_stream(scans, lang)]
    if scans[0].bias_spikes:
        found.append(spikes(scans[0], lang))
    if len(scans) > 1:
        found.append(stock_against_fixed(scans, lang))
    return [*found, int8_losses(scans[0], lang)]


def residual_stream(scans: Sequence[ScanResult], lang: str) -> Chart:
    """The largest magnitude of the residual stream after each layer, against float16's limit."""
    texts, layers = TEXTS[lang], len(layer_numbers(scans[0]))
    values = [site.largest for scan in scans for site in residuals(scan)]
    axis = log_axis(texts["axis_largest"], [*values, FLOAT16_MAX], ",.0f")
    figure = go.Figure(layout=layout(340, xaxis=layer_axis(lang, layers), yaxis=axis))
    for index, scan in enumerate(scans):
        points = residuals(scan)
        figure.add_scatter(
            x=[site.layer for site in points],
            y=[site.largest for site in points],
            mode="lines+markers",
            name=scan_name(scan, lang),
            line={"color": colour_of(scan), "dash": DASHES[index]},
            marker=marker(scan, 15 if layers <= 12 else 9),
            cliponaxis=False,
            hovertext=[hover_text(site, lang) for site in points],
            hoverinfo="text",
        )
    add_limit(figure, FLOAT16_MAX, texts["float16_ends"], layers)
    tops = [site.largest or math.inf for site in residuals(scans[0])]
    spoken = texts["residual_spoken"].format(
        number=number(max(tops), lang), count=sum(top > FLOAT16_MAX for top in tops)
    )
    return Chart("chart-residual", texts["residual_title"], texts["residual_caption"], spoken, figure, 340)


def spikes(scan: ScanResult, lang: str) -> Chart:
    """The spikes of the biases of q_proj and k_proj by layer."""
    texts = TEXTS[lang]
    axis = {"title_text": texts["axis_bias"], "rangemode": "tozero"}
    figure = go.Figure(layout=layout(320, xaxis=layer_axis(lang, len(layer_numbers(scan))), yaxis=axis))
    for index, (projection, colour) in enumerate((("k_proj", "third"), ("q_proj", "fourth"))):
        points = [spike for spike in scan.bias_spikes if spike.projection == projection]
        figure.add_scatter(
            x=[spike.layer for spike in points],
            y=[None if spike.bias is None else abs(spike.bias) for spike in points],
            mode="markers",
            name=projection,
            marker={"color": STAND_INS[colour], "symbol": SYMBOLS[index], "size": 10, "opacity": 0.8},
            hovertext=[
                f"{bias_text(spike, ',.1f', lang)}: "
                + texts["comma"].join(texts[key].format(**vars(spike)) for key in ("layer", "head", "channel"))
                for spike in points
            ],
            hoverinfo="text",
        )
    spoken = spikes_text(scan, lang)
    return Chart("chart-spikes", texts["spikes_title"], texts["spikes_caption"], spoken, figure, 320)


def int8_losses(scan: ScanResult, lang: str) -> Chart:
    """The median channel's loss when the inputs of linears are rounded to int8, by layer."""
    texts, quantisation, layers = TEXTS[lang], scan.quantisation, len(layer_numbers(scan))
    losses = [_drawn(found.int8_loss) for found in quantisation.linear_inputs]
    axis = log_axis(texts["axis_loss"], [*losses, quantisation.loss_limit], ".1%")
    figure = go.Figure(layout=layout(340, xaxis=layer_axis(lang, layers), yaxis=axis))
    for index, (site, feeds) in enumerate(LINEAR_INPUTS.items()):
        points = [found for found in quantisation.linear_inputs if found.site == site]
        figure.add_scatter(
            x=[found.layer for found in points],
            y=[_drawn(found.int8_loss) for found in points],
            mode="lines+markers",
            name=feeds,
            line={"color": STAND_INS[("fixed", "third", "stock", "fourth")[index]], "dash": DASHES[index]},
            marker={"symbol": SYMBOLS[index], "size": 8},
            hovertemplate="%{y:.2%}",
        )
    add_limit(figure, quantisation.loss_limit, texts["leave_in_16"], layers)
    keep = len(quantisation.keep_16_bit)
    spoken = texts["int8_spoken"].format(count=keep, limit=f"{quantisation.loss_limit:.0%}")
    return Chart("chart-int8", texts["int8_title"], texts["int8_caption"], spoken, figure, 340)


def _drawn(loss: float | None) -> float | None:
    return None if loss is None else max(loss, LEAST_LOSS)
