"""Whether a verification passes, why not, and the sentence that says so."""

from collections.abc import Sequence

from .result import VerifiedRow
from .text import number


def shortcomings(rows: Sequence[VerifiedRow], max_kl: float | None, max_ppl_drift: float | None) -> list[str]:
    """The reasons why the rows do not pass, a phrase each, with the row's name first."""
    found = []
    for row in rows:
        if row.fixed and not row.finite:
            found.append(f"{row.name} is not finite, first in {row.first_overflow or 'the logits'}")
        elif row.fixed and row.dtype == "float16":
            if max_kl is not None and not within(row.kl_mean, max_kl):
                found.append(f"{row.name} has a mean KL of {number(row.kl_mean, '.3g')}, above {max_kl:g}")
            if max_ppl_drift is not None and not within(row.drift, max_ppl_drift):
                drift = number(row.drift, "+.3g")
                found.append(f"{row.name} has a perplexity drift of {drift}, beyond {max_ppl_drift:g}")
    return found


def within(value: float | None, limit: float) -> bool:
    """Whether a value is at most `limit` away from 0. False for a value that is not known."""
    return value is not None and abs(value) <= limit


def verdict_of(rows: Sequence[VerifiedRow], reasons: Sequence[str]) -> str:
    """The verdict: the first reason why not, or how close fixed float16 is to the oracle."""
    if reasons:
        more = f", and {len(reasons) - 1} more." if len(reasons) > 1 else "."
        return f"Not verified: {reasons[0]}{more}"
    half = [row for row in rows if row.fixed and row.dtype == "float16"]
    kl = max((row.kl_mean for row in half if row.kl_mean is not None), default=None)
    drifts = [abs(row.drift) for row in half if row.drift is not None]
    broken = [row.name for row in rows if not row.finite]
    return (
        f"Verified: every fixed row is finite, and fixed float16 is within a mean KL of {number(kl, '.2g')} and a "
        f"perplexity drift of {number(max(drifts, default=None), '.2g')} of stock float32"
        + (f"; not finite: {', '.join(broken)}." if broken else ".")
    )
