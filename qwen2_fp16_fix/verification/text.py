"""A verification as text for a terminal."""

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..activations.extremes import overflow_lines
from .result import VerificationResult, VerifiedRow


def rendered(found: VerificationResult) -> Group:
    """The settings, the table, the first site of each row that is not finite, and the verdict, for rich."""
    settings = found.settings
    head = (
        f"{found.checkpoint}: {settings.tokens} tokens, window {settings.window}, stride {settings.stride}, "
        f"on {settings.device}; oracle: stock float32 eager"
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)  # fits into 80 columns
    for name in ("", "ppl", "drift", "KL mean", "KL max", "top-1", "Δlogit", "text", "s", "MB"):
        table.add_column(name, justify="right" if name else "left")
    for row in found.rows:
        table.add_row(*_cells(row), style=None if row.finite else "red")
    overflows = overflow_lines((row.name, row.first_overflow) for row in found.rows)
    more = [f"not verified: {reason}" for reason in found.reasons[1:]]
    return Group(Text(head), table, *map(Text, (*overflows, *more, found.verdict)))


def _cells(row: VerifiedRow) -> tuple[str, ...]:
    peak = row.peak_bytes
    same = sum(difference is None for difference in row.first_differences)
    return (
        row.name.replace("float", "fp").replace("bfp", "bf"),
        number(row.perplexity, ".4f") if row.finite else "NaN",
        number(row.drift, "+.1e"),
        number(row.kl_mean, ".1e"),
        number(row.kl_max, ".1e"),
        number(row.top1_agreement, ".3f"),
        number(row.largest_logit_difference, ".2g"),
        f"{same}/{len(row.first_differences)}",
        f"{row.seconds:.1f}",
        number(None if peak is None else peak / 1e6, ".0f"),
    )


def number(value: float | None, form: str) -> str:
    """A number, or a dash for one that is not known."""
    return "-" if value is None else format(value, form)
