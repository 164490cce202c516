"""The report: one HTML page of scans and, if given, a verification. It loads nothing from the network."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from ..activations.sites import SITES
from ..scanning.result import ScanResult
from ..scanning.sentences import consequences, site_name
from .card import card
from .charts import charts
from .drawing import svgs
from .picture import band_names
from .style import BANDS, FP32, PALETTE, TEXTS, model_name, scan_name
from .tables import (
    Table,
    against_table,
    all_numbers,
    cache_table,
    heat_map,
    int8_table,
    massive_table,
    residual_table,
    spike_table,
    verification_table,
)

TEMPLATE = Path(__file__).parent / "template"
TERMS = ("headroom", "site", "measured", "bound", "subnormal", "massive", "spike", "loss", "score_error")
#: The values of each chart, which stand below it.
VALUES: dict[str, Callable[[Sequence[ScanResult], str], list[Table]]] = {
    "chart-residual": lambda scans, lang: [residual_table(scans, lang)],
    "chart-against": lambda scans, lang: [against_table(scans, lang)],
    "chart-spikes": lambda scans, lang: [spike_table(scans[0], lang)],
    "chart-int8": lambda scans, lang: [int8_table(scans[0], lang), cache_table(scans, lang)],
}


def page(scans: Sequence[ScanResult], verification: dict[str, Any] | None = None, lang: str = "en") -> str:
    """The page. scans: one, or stock's and fixed's; verification: what `verify --json` prints."""
    texts, first = TEXTS[lang], scans[0]
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["ticked"] = ticked
    classes: dict[str, str] = {}
    drawn = [
        chart._asdict()
        | {"svgs": {width: Markup(svg) for width, svg in svgs(chart, lang, classes).items()}}
        | {"tables": VALUES[chart.id](scans, lang)}
        for chart in charts(scans, lang)
    ]
    css = templates.get_template("report.css").render(palette=PALETTE, bands=(*BANDS, FP32), classes=classes)
    return templates.get_template("report.html").render(
        t=texts,
        css=Markup(css),
        js=Markup((TEMPLATE / "report.js").read_text(encoding="utf-8")),
        name=model_name(first.checkpoint),
        card=card(scans, lang),
        consequences=consequences(first, lang),
        maps=[heat_map(scan, lang) for scan in scans],
        map_sites=[site_name(name, lang) for name in SITES],
        bands=band_names(lang),
        charts=drawn,
        parts=parts(scans, verification, lang),
        terms=[{"name": texts[f"term_{term}"], "text": texts[f"term_{term}_text"]} for term in TERMS],
        prompts=first.prompts,
        versions=first.versions,
        version_list=versions(scans, lang),
    )


def ticked(text: str) -> Markup:
    """A sentence with its `tokens` set as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


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
    return [*found, numbers | {"tables": [all_numbers(scans, lang)]}]


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
        (texts["made"], time.strftime("%Y-%m-%d")),
        (
            texts["ran"],
            f"{' + '.join(scan_name(scan, lang) for scan in scans)}, {settings.attention}, {settings.device}",
        ),
    ]
    return [{"name": name, "text": text} for name, text in named]
