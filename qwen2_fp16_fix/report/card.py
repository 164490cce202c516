"""What a report begins with: the verdict in a few words, where in words, what to do, and stock beside fixed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..scanning.result import ScanResult
from ..scanning.sentences import site_in_layer, where_text
from ..translations import number_text
from .style import TEXTS, kind_of, scan_name, signed

CODE = "import qwen2_fp16_fix\nqwen2_fp16_fix.register()"


class Cell(NamedTuple):
    """A cell of stock beside fixed. mark: "good" or "bad" for its colour."""

    text: str
    note: str = ""
    mark: str = ""


def headline(scans: Sequence[ScanResult], lang: str) -> list[tuple[str, str]]:
    """The verdict, each sentence with its mark: "Breaks in stock float16. Safe with the fix."

    Safe is what `certify` proves for any prompt.
    """
    by_kind = {kind_of(scan): scan for scan in scans}
    stock, fixed, proven = by_kind.get("stock"), by_kind.get("fixed"), scans[0].certificate.proven
    found = []
    if stock is not None:
        found.append("headline_stock_finite" if stock.finite else "headline_stock_broken")
    if fixed is not None and not fixed.finite:
        found.append("headline_fixed_broken")
    elif proven:
        found.append("headline_fixed_proven")
    elif fixed is not None:
        found.append("headline_fixed_finite")
    return [(TEXTS[lang][key], "bad" if key.endswith("broken") else "good") for key in found]


def place_words(scans: Sequence[ScanResult], lang: str) -> str:
    """Where the first scan breaks, or comes closest to the limit, for readers who do not know the names of sites."""
    texts, first = TEXTS[lang], scans[0]
    at = first.first_nonfinite or first.tightest
    words = texts[f"words_{at.site}"]
    place = words if at.layer is None else texts["layer_words"].format(layer=at.layer, words=words)
    key = "closest_at" if first.first_nonfinite is None else "breaks_at" if first.first_nonfinite.exact else "lost_at"
    return texts[key].format(place=place, number=number_text(at.largest, lang))


def card(scans: Sequence[ScanResult], lang: str) -> dict[str, Any]:
    """What the template shows as the first card."""
    texts, first = TEXTS[lang], scans[0]
    at = first.first_nonfinite or first.tightest
    tokens = sum(prompt.tokens for prompt in first.prompts)
    foreign = (
        [texts["verdict_foreign"].format(name=first.foreign_code).strip()] if first.foreign_code is not None else []
    )
    return {
        "good": scans[-1].finite and (len(scans) > 1 or first.finite),
        "headline": headline(scans, lang),
        "words": place_words(scans, lang),
        "coordinates": where_text(at.where, lang),
        "notes": [
            texts["proven_words" if first.certificate.proven else "not_proven_words"],
            *foreign,
        ],
        "read": texts["read"].format(prompts=len(first.prompts), tokens=tokens),
        "code": CODE,
        "heads": [scan_name(scan, lang) for scan in scans],
        "rows": [
            {"name": texts[f"row_{name}"], "cells": [cell(scan, lang) for scan in scans]}
            for name, cell in (
                ("outcome", _outcome),
                ("tightest", _tightest),
                ("largest", _largest),
                ("over", _over),
                ("proof", _proof),
            )
            if name != "proof" or scans[-1].settings.fixed
        ],
    }


def _outcome(scan: ScanResult, lang: str) -> Cell:
    texts, first = TEXTS[lang], scan.first_nonfinite
    if first is None:
        return Cell(texts["outcome_finite"], mark="good")
    text = texts["outcome_broken_end"] if first.layer is None else texts["outcome_broken"].format(layer=first.layer)
    return Cell(text, mark="bad")


def _tightest(scan: ScanResult, lang: str) -> Cell:
    tight = scan.tightest
    bits = TEXTS[lang]["not_finite"] if tight.headroom_bits is None else signed(tight.headroom_bits)
    text = bits if tight.headroom_bits is None else TEXTS[lang]["bits"].format(bits=bits)
    return Cell(text, site_in_layer(tight, lang))


def _largest(scan: ScanResult, lang: str) -> Cell:
    return Cell(number_text(scan.tightest.largest, lang), TEXTS[lang]["float16_ends"])


def _over(scan: ScanResult, lang: str) -> Cell:
    over = len(scan.past_limit)
    return Cell(TEXTS[lang]["over_of"].format(over=over, sites=len(scan.sites)), mark="bad" if over else "")


def _proof(scan: ScanResult, lang: str) -> Cell:
    """certify proves the fixed model finite; of a stock one that stays finite here it says nothing."""
    texts = TEXTS[lang]
    if not scan.settings.fixed:
        return Cell(texts["no_proof"])
    return Cell(texts["proven" if scan.certificate.proven else "not_proven"])
