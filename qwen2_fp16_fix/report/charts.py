"""The charts of a report, drawn by matplotlib on axes: the same code draws them for the page and for the picture."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from matplotlib.transforms import blended_transform_factory

from ..activations.sites import SITES
from ..patches.range_plan import FLOAT16_MAX
from ..scanning.measurements import LINEAR_INPUTS
from ..scanning.result import ScanResult
from ..scanning.sentences import site_name, spikes_text
from ..translations import number_text
from .style import TEXTS, kind_of, layer_numbers, log_ticks, residuals, scan_name

LEAST_LOSS = 1e-4  # a smaller loss is drawn as this
LEAST, MOST = -4.0, 16.0  # bits that a dot can show; fp32 has more
DASHES = ("-", "--", ":", "-.")
SYMBOLS = ("o", "s", "D", "^")
MARKED = 40  # layers up to which every point has a mark


class Pen(NamedTuple):
    """How a chart is drawn. colours: by name of the palette; word: a text as matplotlib is to get it."""

    lang: str
    colours: Mapping[str, str]
    word: Callable[[str], str]
    narrow: bool = False

    def text(self, key: str) -> str:
        """A text of the report."""
        return self.word(TEXTS[self.lang][key])


class Chart(NamedTuple):
    """A chart of the page with its words. spoken: for a screen reader. rows: its height in lines of text."""

    id: str
    title: str
    caption: str
    spoken: str
    draw: Callable[[Axes, Pen], None]
    rows: float


def charts(scans: Sequence[ScanResult], lang: str) -> list[Chart]:
    """The charts for one scan, or for a stock and a fixed one."""
    found = [_residual_chart(scans, lang)]
    if len(scans) > 1:
        found.append(_against_chart(scans, lang))
    if scans[0].bias_spikes:
        draw = _partial(spikes, scans[0])
        found.append(_chart("spikes", spikes_text(scans[0], lang), draw, 22, lang))
    lost = scans[0].quantisation
    spoken = TEXTS[lang]["int8_spoken"].format(count=len(lost.keep_16_bit), limit=f"{lost.loss_limit:.0%}")
    return [*found, _chart("int8", spoken, _partial(int8_losses, scans[0]), 24, lang)]


def _chart(name: str, spoken: str, draw: Callable[[Axes, Pen], None], rows: float, lang: str) -> Chart:
    texts = TEXTS[lang]
    return Chart(f"chart-{name}", texts[f"{name}_title"], texts[f"{name}_caption"], spoken, draw, rows)


def _partial(draw: Callable[[Axes, Any, Pen], None], measured: Any) -> Callable[[Axes, Pen], None]:
    return lambda axes, pen: draw(axes, measured, pen)


def _residual_chart(scans: Sequence[ScanResult], lang: str) -> Chart:
    texts = TEXTS[lang]
    top = number_text(max((site.largest or math.inf for site in residuals(scans[-1])), default=0.0), lang)
    stop = next((over for scan in scans if (over := first_over(scan)) is not None), None)
    key = "residual_below" if stop is None else "residual_spoken"
    return _chart("residual", texts[key].format(number=top, layer=stop), _partial(residual_stream, scans), 25, lang)


def _against_chart(scans: Sequence[ScanResult], lang: str) -> Chart:
    over = [sum(bits < 0 for bits in least_headroom(scan).values()) for scan in scans]
    spoken = TEXTS[lang]["against_spoken"].format(stock=over[0], fixed=over[1])
    return _chart("against", spoken, _partial(stock_against_fixed, scans), 28, lang)


def first_over(scan: ScanResult) -> int | None:
    """The first layer whose residual stream is over the limit of what it is stored as."""
    return next((site.layer for site in residuals(scan) if site.past_limit), None)


def residual_stream(axes: Axes, scans: Sequence[ScanResult], pen: Pen) -> None:
    """The residual stream after each layer. A line ends where the stream exceeds what it is stored as."""
    count = len(layer_numbers(scans[0]))
    for scan in scans:
        _residual_line(axes, scan, count, pen)
    axes.axhline(FLOAT16_MAX, color=pen.colours["bad"], linestyle="--", linewidth=1.3, label=pen.text("float16_ends"))
    values = [site.largest for scan in scans for site in residuals(scan)]
    _log_axis(axes, [*values, FLOAT16_MAX * 1.25], lambda tick: f"{tick:,.0f}")
    _layer_axis(axes, count, pen, right=0.4 if pen.narrow else 0.2)
    axes.set_ylabel(pen.text("axis_largest"))
    _legend(axes, pen)


def _residual_line(axes: Axes, scan: ScanResult, count: int, pen: Pen) -> None:
    """A thick line with rings for stock, a thin one with squares for fixed: each can be seen where they coincide."""
    points, over, fixed = residuals(scan), first_over(scan), scan.settings.fixed
    seen = [site for site in points if over is None or (site.layer or 0) < over]
    colour = pen.colours[kind_of(scan)]
    size = 1.0 if count <= 12 else 0.6
    mark: dict[str, Any] = {"marker": "s" if fixed else "o", "markersize": size * (4 if fixed else 9)}
    axes.plot(
        [site.layer or 0 for site in seen],
        [math.nan if site.largest is None else site.largest for site in seen],
        color=colour,
        linewidth=1.4 if fixed else 3.5 * size,
        fillstyle="full" if fixed else "none",
        label=pen.word(scan_name(scan, pen.lang)),
        zorder=3 if fixed else 2,
        **(mark if count <= MARKED else {}),
    )
    if over is not None:
        before = [(site.layer or 0, site.largest or FLOAT16_MAX) for site in seen[-1:]]
        ends = [*before, (over, FLOAT16_MAX)]
        axes.plot(*zip(*ends, strict=True), color=colour, linewidth=3.5 * size, linestyle=":", zorder=2)
        axes.plot([over], [FLOAT16_MAX], color=colour, marker="X", markersize=11 * size, linestyle="", zorder=4)
        _note(axes, f"✗ {pen.text('infinite_from')}", (over, FLOAT16_MAX), colour, (9, -5), va="top")
    elif points and points[-1].stored_as == "float32" and points[-1].largest is not None:
        _note(axes, pen.text("kept_in_fp32"), (count - 1, points[-1].largest), colour, (7, 0), va="center")


def stock_against_fixed(axes: Axes, scans: Sequence[ScanResult], pen: Pen) -> None:
    """The least headroom of each site over all layers, stock beside fixed; fp32 is at the right edge."""
    names = list(reversed(SITES))
    ends = [least_headroom(scan) for scan in scans]
    pairs = [(y, [end[name] for end in ends]) for y, name in enumerate(names) if all(name in end for end in ends)]
    rows, lows, highs = [y for y, _ in pairs], [min(pair) for _, pair in pairs], [max(pair) for _, pair in pairs]
    axes.hlines(rows, lows, highs, color=pen.colours["line"], linewidth=3, zorder=1)
    for scan, end in zip(scans, ends, strict=True):
        fixed = scan.settings.fixed
        axes.plot(
            [end[name] for name in names if name in end],
            [y for y, name in enumerate(names) if name in end],
            color=pen.colours[kind_of(scan)],
            marker="s" if fixed else "o",
            markersize=5 if fixed else 9,
            fillstyle="full" if fixed else "none",
            linestyle="",
            label=pen.word(scan_name(scan, pen.lang)),
            zorder=3,
        )
    axes.axvline(0, color=pen.colours["bad"], linestyle="--", linewidth=1.3)
    _frame(axes, pen)
    axes.set_xlim(LEAST - 0.5, MOST + 0.7)
    axes.set_xticks([-4, 0, 4, 8, 12, 16], ["−4", "0", "4", "8", "12", pen.text("fp32_edge")])
    axes.set_yticks(range(len(names)), [pen.word(site_name(name, pen.lang)) for name in names])
    axes.set_xlabel(pen.text("headroom_bits"))
    _legend(axes, pen)


def least_headroom(scan: ScanResult) -> dict[str, float]:
    """The least headroom of each site over the layers. MOST stands for fp32 and for sites that are not stored."""
    found: dict[str, float] = {}
    for site in scan.sites:
        if site.site in SITES:
            bits = LEAST if site.headroom_bits is None else site.headroom_bits
            found[site.site] = min(found.get(site.site, MOST), max(bits, LEAST))
    return found


def spikes(axes: Axes, scan: ScanResult, pen: Pen) -> None:
    """The spikes of the biases of q_proj and k_proj by layer."""
    for index, (projection, colour) in enumerate((("k_proj", "third"), ("q_proj", "fourth"))):
        points = [spike for spike in scan.bias_spikes if spike.projection == projection and spike.bias is not None]
        layers, sizes = [spike.layer for spike in points], [abs(spike.bias or 0.0) for spike in points]
        axes.plot(layers, sizes, color=pen.colours[colour], marker=SYMBOLS[index], linestyle="", label=projection)
    axes.set_ylim(bottom=0)
    _layer_axis(axes, len(layer_numbers(scan)), pen)
    axes.set_ylabel(pen.text("axis_bias"))
    _legend(axes, pen)


def int8_losses(axes: Axes, scan: ScanResult, pen: Pen) -> None:
    """The median channel's loss when the inputs of linears are rounded to int8, by layer."""
    lost, count = scan.quantisation, len(layer_numbers(scan))
    for index, (site, feeds) in enumerate(LINEAR_INPUTS.items()):
        points = [found for found in lost.linear_inputs if found.site == site]
        axes.plot(
            [found.layer for found in points],
            [math.nan if found.int8_loss is None else max(found.int8_loss, LEAST_LOSS) for found in points],
            color=pen.colours[("fixed", "third", "stock", "fourth")[index]],
            linestyle=DASHES[index],
            marker=SYMBOLS[index] if count <= MARKED else "",
            markersize=5,
            label=feeds,
        )
    axes.axhline(
        lost.loss_limit, color=pen.colours["bad"], linestyle="--", linewidth=1.3, label=pen.text("leave_in_16")
    )
    losses = [found.int8_loss and max(found.int8_loss, LEAST_LOSS) for found in lost.linear_inputs]
    _log_axis(axes, [*losses, lost.loss_limit * 1.5], lambda tick: f"{tick:.2g}%" if tick < 1 else f"{tick:.0f}%", 100)
    _layer_axis(axes, count, pen)
    axes.set_ylabel(pen.text("axis_loss"))
    _legend(axes, pen)


def _frame(axes: Axes, pen: Pen) -> None:
    """The common look: no box, a pale grid, the colours of the theme."""
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(color=pen.colours["line"], linewidth=0.8, clip_on=False)
    axes.tick_params(length=0, colors=pen.colours["ink"])
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(pen.colours["muted"])


def _layer_axis(axes: Axes, count: int, pen: Pen, right: float = 0.0) -> None:
    """Every layer that has room for its number. right: room for notes at the end of lines, as a share of the width."""
    _frame(axes, pen)
    step = max(1, math.ceil(count / (8 if pen.narrow else 16)))
    axes.set_xlim(-0.5, count - 0.5 + right * count)
    axes.set_xticks(range(0, count, step), [str(layer) for layer in range(0, count, step)])
    axes.set_xlabel(pen.text("axis_layer"))


def _log_axis(axes: Axes, values: Sequence[float | None], form: Callable[[float], str], scale: float = 1) -> None:
    low, high, ticks = log_ticks(values)
    axes.set_ylim(10**low, 10**high)  # first: the scale would look for limits itself, which numbers of NaN do not give
    axes.set_yscale("log")
    axes.set_yticks(ticks, [form(tick * scale) for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())


def _note(axes: Axes, text: str, at: tuple[float, float], colour: str, offset: tuple[float, float], va: str) -> None:
    axes.annotate(text, at, offset, textcoords="offset points", color=colour, va=va, zorder=5)


def _legend(axes: Axes, pen: Pen) -> None:
    """The legend, above the chart, so that it covers no line."""
    handles, _ = axes.get_legend_handles_labels()
    legend = axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.01, 1.0),
        bbox_transform=blended_transform_factory(axes.figure.transSubfigure, axes.transAxes),
        ncols=2 if pen.narrow else len(handles),
        frameon=False,
        borderpad=0.2,
        borderaxespad=0.2,
        handlelength=2.2,
    )
    for text in legend.get_texts():
        text.set_color(pen.colours["ink"])
