"""The tables of a report: every chart's numbers are also here, to read, to search and to reach by keyboard."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..activations.sites import SITES
from ..scanning.measurements import LINEAR_INPUTS
from ..scanning.result import CacheLosses, Losses, MeasuredSite, ScanResult
from ..scanning.sentences import bias_text, site_name, token_name, where_text
from ..translations import number_text
from .charts import MOST, least_headroom
from .style import TEXTS, band_of, bits_text, cells_of, kind_of, layer_numbers, residuals, scan_name, signed

CALM = 8.0  # bits of headroom from which a row is left out on paper


class ColumnHead(NamedTuple):
    """A column's head; numbers are set to the right, long texts may wrap."""

    text: str
    number: bool = False
    wrap: bool = False


class TableRow(NamedTuple):
    """Cells; the first heads the row. bad: the row is marked. calm: the row is left out on paper."""

    cells: tuple[str, ...]
    bad: bool = False
    calm: bool = False


class Table(NamedTuple):
    """A table. tall: it scrolls by itself on screen."""

    id: str
    caption: str
    heads: tuple[ColumnHead, ...]
    rows: list[TableRow]
    tall: bool = False


def heads(lang: str, *names: str) -> tuple[ColumnHead, ...]:
    """Heads by their keys; `n:` before a key marks numbers, `w:` texts that may wrap."""
    found = (name.rpartition(":") for name in names)
    return tuple(ColumnHead(TEXTS[lang][f"column_{key}"], kind == "n", kind == "w") for kind, _, key in found)


def all_numbers(scans: Sequence[ScanResult], lang: str) -> Table:
    """Every site of every layer, stock beside fixed."""
    sizes = [f"n:{name}_{kind_of(scan)}" for scan in scans for name in ("largest", "bits")]
    columns = heads(lang, "place", *sizes, "stored_as", "n:subnormal", "n:bound", "w:where")
    rows = [_site_row(sites, lang) for sites in zip(*(scan.sites for scan in scans), strict=True)]
    return Table("numbers-table", TEXTS[lang]["numbers_caption"], columns, rows, tall=True)


def _site_row(sites: tuple[MeasuredSite, ...], lang: str) -> TableRow:
    """A site of one scan or of both. Bound and type are those of the last: of the fixed model if there is one."""
    texts, first, last = TEXTS[lang], sites[0], sites[-1]
    layer = "" if first.layer is None else f"{first.layer} · "
    sizes = [text for site in sites for text in (number_text(site.largest, lang), _bits(site, lang))]
    return TableRow(
        (
            f"{layer}{site_name(first.site, lang)}",
            *sizes,
            last.stored_as or texts["not_stored"],
            f"{first.subnormal_share:.2%}" if first.subnormal_share else "0",
            "–" if last.bound is None else number_text(last.bound, lang),
            where_text(first.where, lang).replace("`", ""),
        ),
        any(site.past_limit for site in sites),
        calm=all(site.headroom_bits is not None and site.headroom_bits >= CALM for site in sites),
    )


def _bits(site: MeasuredSite, lang: str) -> str:
    if site.headroom_bits is None:
        return TEXTS[lang]["not_finite"]
    if site.stored_as is None:
        return "–"
    return "fp32" if site.stored_as == "float32" else f"{site.headroom_bits:.2f}".replace("-", "−")


class HeatMap(NamedTuple):
    """A map of headroom: a row of cells for each layer, each with its text and the name of its band."""

    id: str
    caption: str
    rows: list[tuple[int, list[tuple[str, str]]]]


def heat_map(scan: ScanResult, lang: str) -> HeatMap:
    """Headroom by layer and site, as a table with coloured cells: it has its numbers on a phone, too."""
    first = scan.first_nonfinite
    broken = None if first is None else (first.layer, first.site)
    rows = []
    for layer, row in zip(layer_numbers(scan), cells_of(scan), strict=True):
        marks = [" first" if (layer, site) == broken else "" for site in SITES]
        bands = [band.name if (band := band_of(cell)) is not None else "" for cell in row]
        texts = [bits_text(cell) for cell in row]
        rows.append((layer, list(zip(texts, map(str.__add__, bands, marks), strict=True))))
    return HeatMap(f"map-{kind_of(scan)}", TEXTS[lang]["map_of"].format(scan=scan_name(scan, lang)), rows)


def residual_table(scans: Sequence[ScanResult], lang: str) -> Table:
    """The largest magnitude after each layer; infinite where the model that stores it has no room for it."""
    rows = []
    for sites in zip(*map(residuals, scans), strict=True):
        cells = [_residual(site, lang) for site in sites]
        rows.append(TableRow((str(sites[0].layer), *cells), sites[0].past_limit))
    columns = heads(lang, "layer", *(f"n:{kind_of(scan)}" for scan in scans))
    return Table("residual-table", TEXTS[lang]["residual_table"], columns, rows, tall=True)


def _residual(site: MeasuredSite, lang: str) -> str:
    shown = number_text(site.largest, lang)
    return TEXTS[lang]["infinite"].format(number=shown) if site.past_limit and site.largest is not None else shown


def against_table(scans: Sequence[ScanResult], lang: str) -> Table:
    """The least headroom of each site."""
    ends = [least_headroom(scan) for scan in scans]
    rows = [
        TableRow(
            (site_name(name, lang), *(_least(end.get(name), lang) for end in ends)),
            any(end.get(name, 0) < 0 for end in ends),
        )
        for name in SITES
    ]
    columns = heads(lang, "site_name", *(f"n:{kind_of(scan)}" for scan in scans))
    return Table("against-table", TEXTS[lang]["against_table"], columns, rows)


def _least(bits: float | None, lang: str) -> str:
    return "–" if bits is None else TEXTS[lang]["fp32_edge"] if bits >= MOST else signed(bits)


def int8_table(scan: ScanResult, lang: str) -> Table:
    """The int8 losses of the inputs of linears, by layer."""
    lost = scan.quantisation
    by_place = {(found.layer, found.site): found.int8_loss for found in lost.linear_inputs}
    rows = []
    for layer in layer_numbers(scan):
        losses = [by_place.get((layer, site)) for site in LINEAR_INPUTS]
        rows.append(TableRow((str(layer), *(_form(loss, ".2%") for loss in losses)), layer in lost.keep_16_bit))
    feeds = tuple(ColumnHead(feeds, number=True) for feeds in LINEAR_INPUTS.values())
    return Table("int8-table", TEXTS[lang]["int8_table"], (*heads(lang, "layer"), *feeds), rows, tall=True)


def spike_table(scan: ScanResult, lang: str) -> Table:
    """The largest spikes of the biases."""
    rows = [
        TableRow(
            (
                f"{spike.layer} · {spike.projection}",
                str(spike.head),
                str(spike.channel),
                str(spike.rotary_pair),
                bias_text(spike, ",.1f", lang).replace("-", "−"),
                "–" if spike.times_median is None else f"{spike.times_median:,.0f}",
            )
        )
        for spike in scan.bias_spikes[:12]
    ]
    columns = heads(lang, "bias", "n:head", "n:channel", "n:pair", "n:value", "n:times_median")
    caption = TEXTS[lang]["spike_table"].format(shown=len(rows), found=scan.bias_spikes_found)
    return Table("spike-table", caption, columns, rows)


def massive_table(scan: ScanResult, lang: str) -> Table:
    """The channels with massive activations."""
    rows = [
        TableRow(
            (
                str(found.where.channel),
                number_text(found.magnitude, lang),
                str(found.layer),
                f"{found.where.position} {token_name(found.where.token_id, found.where.token)}",
                _ranges(found.layers),
            )
        )
        for found in scan.massive_activations
    ]
    columns = heads(lang, "n:channel", "n:largest", "n:after_layer", "token", "layers")
    return Table("massive-table", TEXTS[lang]["massive_table"], columns, rows)


def _ranges(numbers: Sequence[int]) -> str:
    """Layer numbers with runs as first–last."""
    runs: list[list[int]] = []
    for value in numbers:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def cache_table(scans: Sequence[ScanResult], lang: str) -> Table:
    """The losses of int8 and int4 caches, stock beside fixed."""
    found = [(scan, layer) for scan in scans for layer in scan.quantisation.cache]
    rows = [_cache_row(scan, layer, lang) for scan, layer in sorted(found, key=lambda pair: pair[1].layer)]
    columns = heads(
        lang, "layer", "n:keys_int8", "n:keys_int4", "n:values_int8", "n:values_int4", "n:score_int8", "n:score_int4"
    )
    return Table("cache-table", TEXTS[lang]["cache_table"], columns, rows, tall=True)


def _cache_row(scan: ScanResult, found: CacheLosses, lang: str) -> TableRow:
    pairs = (_pair(found.keys, ".1%"), _pair(found.values, ".1%"), _pair(found.score_error, ".3f"))
    cells = (f"{found.layer} · {scan_name(scan, lang)}", *(cell for pair in pairs for cell in pair))
    return TableRow(cells, found.keys is not None and found.keys.int8 > scan.quantisation.loss_limit)


def _pair(found: Losses | None, form: str) -> tuple[str, str]:
    return ("–", "–") if found is None else (format(found.int8, form), format(found.int4, form))


def verification_table(found: dict[str, Any], lang: str) -> Table:
    """The rows of `verify`."""
    rows = []
    for row in found["rows"]:
        finite = row["finite"]
        rows.append(
            TableRow(
                (
                    row["name"],
                    f"{row['perplexity']:.4f}" if finite and row["perplexity"] is not None else "NaN",
                    _form(row["drift"], "+.2e"),
                    _form(row["kl_mean"], ".2e"),
                    _form(row["kl_max"], ".2e"),
                    _form(row["top1_agreement"], ".2%"),
                    _form(row["largest_logit_difference"], ".3g"),
                    row["first_overflow"] or "–",
                ),
                not finite,
            )
        )
    columns = heads(
        lang, "row", "n:perplexity", "n:drift", "n:kl_mean", "n:kl_max", "n:top1", "n:logit", "w:first_overflow"
    )
    settings = found["settings"]
    caption = TEXTS[lang]["verify_table"].format(tokens=settings["tokens"], window=settings["window"])
    return Table("verify-table", caption, columns, rows)


def _form(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form).replace("-", "−")
