"""The report: one HTML page of scans and, if given, a verification. It loads nothing from the network."""

import base64
import gzip
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline
from markupsafe import Markup, escape

from ..scanning.result import ScanResult
from ..scanning.sentences import consequences, number, site_in_layer, verdict
from ..translations import SCAN_TEXTS as TEXTS
from .charts import charts
from .frame import Chart
from .style import PALETTE, scan_name, stand_ins
from .tables import all_numbers, cache_table, massive_table, spike_table, verification_table

TEMPLATE = Path(__file__).parent / "template"
TERMS = ("headroom", "site", "measured", "bound", "subnormal", "massive", "spike", "loss", "score_error")


def page(scans: Sequence[ScanResult], verification: dict[str, Any] | None = None, lang: str = "en") -> str:
    """The page. scans: one, or stock's and fixed's; verification: what `verify --json` prints."""
    texts, first = TEXTS[lang], scans[0]
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    templates.filters["ticked"] = ticked
    drawn = charts(scans, lang)
    return templates.get_template("report.html").render(
        t=texts,
        css=Markup(templates.get_template("report.css").render(palette=PALETTE)),
        js=Markup((TEMPLATE / "report.js").read_text(encoding="utf-8")),
        plotly=packed_plotly(),
        data=Markup(_json({"palette": stand_ins(), "figures": figures(drawn), "tooOld": texts["too_old"]})),
        name=page_name(first.checkpoint),
        verdicts=[{"finite": scan.finite, "sentence": verdict(scan, lang)} for scan in scans],
        facts=facts(first, lang),
        consequences=consequences(first, lang),
        charts=[_with_tables(chart, scans, lang) for chart in drawn],
        parts=parts(scans, verification, lang),
        terms=[{"name": texts[f"term_{term}"], "text": texts[f"term_{term}_text"]} for term in TERMS],
        prompts=first.prompts,
        versions=first.versions,
        version_list=versions(scans, lang),
    )


def page_name(checkpoint: str) -> str:
    """The name of the checkpoint's folder, of "." too. What is not UTF-8 in it is replaced: a page is."""
    return os.path.basename(os.path.realpath(checkpoint)).encode("utf-8", "replace").decode()


def ticked(text: str) -> Markup:
    """A sentence with its `tokens` set as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def packed_plotly() -> str:
    """plotly.js as gzip in base64: 2 MB instead of 5. Browsers have unpacked gzip since 2023."""
    return base64.b64encode(gzip.compress(plotly.offline.get_plotlyjs().encode(), mtime=0)).decode()


def figures(drawn: Sequence[Chart]) -> dict[str, Any]:
    """The figures as plotly's own JSON, by the id of their place on the page."""
    return {chart.id: json.loads(chart.figure.to_json()) for chart in drawn}


def _json(data: Any) -> str:
    """JSON for a script element: no token in it can end the element."""
    return json.dumps(data, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")


def _with_tables(chart: Chart, scans: Sequence[ScanResult], lang: str) -> dict[str, Any]:
    tables = {"chart-spikes": lambda: [spike_table(scans[0], lang)], "chart-int8": lambda: [cache_table(scans, lang)]}
    return {**chart._asdict(), "tables": tables.get(chart.id, list)()}


def facts(scan: ScanResult, lang: str) -> list[dict[str, str]]:
    """The most important numbers, for the top of the page."""
    texts, tight = TEXTS[lang], scan.tightest
    bits = tight.headroom_bits
    read = {"prompts": len(scan.prompts), "tokens": sum(prompt.tokens for prompt in scan.prompts)}
    shown = texts["not_finite"] if bits is None else f"{bits:+.1f}".replace("-", "−")
    found = [
        ("fact_tightest", shown, site_in_layer(tight, lang)),
        ("fact_largest", number(tight.largest, lang), texts["fact_limit"]),
        ("fact_past", str(len(scan.past_limit)), texts["fact_past_note"].format(sites=len(scan.sites))),
        ("fact_read", f"{read['tokens']:,}", texts["fact_read_note"].format(**read)),
        ("fact_proof", texts["proven" if scan.certificate.proven else "not_proven"], texts["fact_proof_note"]),
    ]
    return [{"name": texts[key], "value": value, "note": note} for key, value, note in found]


def parts(scans: Sequence[ScanResult], verification: dict[str, Any] | None, lang: str) -> list[dict[str, Any]]:
    """The sections that hold tables alone."""
    texts, found = TEXTS[lang], []
    massive = scans[0].massive_activations
    tables = [massive_table(scans[0], lang)] if massive else []
    found.append(
        {
            "id": "massive",
            "title": texts["massive_title"],
            "text": texts["massive_text" if massive else "massive_none"],
            "tables": tables,
        }
    )
    if verification is not None:
        table = verification_table(verification, lang)
        found.append(
            {"id": "verified", "title": texts["verify_title"], "text": texts["verify_text"], "tables": [table]}
        )
    numbers = {"id": "numbers", "title": texts["numbers_title"], "text": texts["numbers_text"]}
    return [*found, numbers | {"tables": all_numbers(scans, lang)}]


def versions(scans: Sequence[ScanResult], lang: str) -> list[dict[str, str]]:
    """The versions, the sizes of the model and the settings of the run."""
    texts, first = TEXTS[lang], scans[0]
    found, settings, model = first.versions, first.settings, first.model
    sizes = texts["sizes"].format(**{key: model[key] for key in ("layers", "hidden", "heads", "kv_heads", "head_dim")})
    named = [
        ("qwen2-fp16-fix", f"{found.package} ({found.patch})"),
        ("transformers", found.transformers),
        ("torch", found.torch),
        (texts["model"], sizes),
        (
            texts["ran"],
            f"{' + '.join(scan_name(scan, lang) for scan in scans)}, {settings.attention}, {settings.device}",
        ),
    ]
    return [{"name": name, "text": text} for name, text in named]
