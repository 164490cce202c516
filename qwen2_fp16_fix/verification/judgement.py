"""Whether a verification passes, why not, and the sentence that says so."""

from collections.abc import Sequence

from ..activations.sites import place_text
from ..translations import VERIFY_TEXTS as TEXTS
from .result import VerifiedRow
from .text import number, row_name


def shortcomings(
    rows: Sequence[VerifiedRow], max_kl: float | None, max_ppl_drift: float | None, language: str = "en"
) -> list[str]:
    """The reasons why the rows do not pass, a phrase each, with the row's name first."""
    texts, found = TEXTS[language], []
    for row in rows:
        name = row_name(row, language)
        if row.fixed and not row.finite:
            place = place_text(row.first_overflow, language) if row.first_overflow else texts["the_logits"]
            found.append(texts["reason_broken"].format(row=name, place=place))
        elif row.fixed and row.dtype == "float16":
            if max_kl is not None and not within(row.kl_mean, max_kl):
                kl = number(row.kl_mean, ".3g")
                found.append(texts["reason_kl"].format(row=name, kl=kl, limit=f"{max_kl:g}"))
            if max_ppl_drift is not None and not within(row.drift, max_ppl_drift):
                drift = number(row.drift, "+.3g")
                found.append(texts["reason_drift"].format(row=name, drift=drift, limit=f"{max_ppl_drift:g}"))
    return found


def within(value: float | None, limit: float) -> bool:
    """Whether a value is at most `limit` away from 0. False for a value that is not known."""
    return value is not None and abs(value) <= limit


def verdict_of(rows: Sequence[VerifiedRow], reasons: Sequence[str], language: str = "en") -> str:
    """The verdict: the first reason why not, or how close fixed float16 is to the oracle."""
    texts = TEXTS[language]
    if reasons:
        key = "verdict_not_more" if len(reasons) > 1 else "verdict_not"
        return texts[key].format(first=reasons[0], more=len(reasons) - 1)
    half = [row for row in rows if row.fixed and row.dtype == "float16"]
    kl = max((row.kl_mean for row in half if row.kl_mean is not None), default=None)
    drifts = [abs(row.drift) for row in half if row.drift is not None]
    broken = [row_name(row, language) for row in rows if not row.finite]
    return texts["verdict_broken" if broken else "verdict"].format(
        kl=number(kl, ".2g"),
        drift=number(max(drifts, default=None), ".2g"),
        rows=texts["comma"].join(broken),
    )
