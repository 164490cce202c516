"""The tables of a report: every chart's numbers are also here, to read, to search and to reach by keyboard."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..scanning.result import CacheLosses, Losses, MeasuredSite, ScanResult
from ..scanning.sentences import bias_text, number, site_name, token_name, where_text
from ..translations import SCAN_TEXTS as TEXTS
from .style import kind_of, scan_name

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


def all_numbers(scans: Sequence[ScanResult], lang: str) -> list[Table]:
    """Every site of every layer, a table for each scan."""
    columns = heads(lang, "place", "n:largest", "n:bits", "stored_as", "n:subnormal", "n:bound", "w:where")
    return [
        Table(
            f"numbers-{kind_of(scan)}",
            TEXTS[lang]["numbers_caption"].format(scan=scan_name(scan, lang)),
            columns,
            [_site_row(site, lang) for site in scan.sites],
            tall=True,
        )
        for scan in scans
    ]


def _site_row(site: MeasuredSite, lang: str) -> TableRow:
    texts = TEXTS[lang]
    layer = "" if site.layer is None else f"{site.layer} · "
    bits = texts["not_finite"] if site.headroom_bits is None else f"{site.headroom_bits:.2f}".replace("-", "−")
    return TableRow(
        (
            f"{layer}{site_name(site.site, lang)}",
            number(site.largest, lang),
            f"✗ {bits}" if site.past_limit else bits,
            site.stored_as or texts["not_stored"],
            f"{site.subnormal_share:.2%}",
            "–" if site.bound is None else f"{site.bound:,.4g}",
            where_text(site.where, lang),
        ),
        site.past_limit,
        calm=site.headroom_bits is not None and site.headroom_bits >= CALM,
    )


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
                number(found.magnitude, lang),
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
