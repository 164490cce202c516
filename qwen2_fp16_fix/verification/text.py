"""A verification as text for a terminal."""

from collections.abc import Iterator

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..activations.extremes import overflow_lines
from ..translations import VERIFY_TEXTS as TEXTS
from .result import MeasuredRow, VerificationResult, VerifiedRow

COLUMNS = ("perplexity", "drift", "kl_mean", "kl_max", "top1", "logit", "text", "seconds", "megabytes")
TIE = 0.1  # logits: fp32 gives the other token at least 90 % of the probability of its own


def rendered(found: VerificationResult) -> Group:
    """The settings, the table, what is to be said of single rows, and the verdict, for rich."""
    settings, language = found.settings, found.language
    texts = TEXTS[language]
    head = texts["head"].format(checkpoint=found.checkpoint, **settings.to_dict())
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)  # fits into 80 columns
    for name in ("", *(texts[f"column_{name}"] for name in COLUMNS)):
        table.add_column(name, justify="right" if name else "left")
    for row in found.rows:
        table.add_row(*_cells(row, language), style=None if row.finite else "red")
    overflows = overflow_lines([(row_name(row, language), row.first_overflow) for row in found.rows], texts, language)
    differing = [line for row in found.rows for line in differing_texts(row, language)]
    more = [texts["not_verified"].format(reason=reason) for reason in found.reasons[1:]]
    return Group(Text(head), table, *map(Text, (*overflows, *differing, *more, found.verdict)))


def _cells(row: VerifiedRow, language: str) -> tuple[str, ...]:
    peak = row.peak_bytes
    return (
        row_name(row, language).replace("float", "fp").replace("bfp", "bf"),
        number(row.perplexity, ".4f") if row.finite else "NaN",
        number(row.drift, "+.1e"),
        number(row.kl_mean, ".1e"),
        number(row.kl_max, ".1e"),
        number(row.top1_agreement, ".3f"),
        number(row.largest_logit_difference, ".2g"),
        TEXTS[language][f"text_{_kind_of_text(row)}"],
        f"{row.seconds:.1f}",
        number(None if peak is None else peak / 1e6, ".0f"),
    )


def _kind_of_text(row: MeasuredRow) -> str:
    """Whether the greedy texts are the oracle's, differ by ties alone, or differ."""
    margins = [
        margin
        for difference, margin in zip(row.first_differences, row.first_margins, strict=True)
        if difference is not None
    ]
    if not margins:
        return "same"
    return "tie" if all(is_tie(row, margin) for margin in margins) else "differs"


def differing_texts(row: MeasuredRow, language: str = "en") -> Iterator[str]:
    """A sentence for each greedy text of a finite float16 row that is not the oracle's: where, and whether by a tie.

    Nothing of bfloat16, whose 8 bits differ in many tokens.
    """
    if not row.finite or row.dtype != "float16":
        return
    for prompt, (token, margin) in enumerate(zip(row.first_differences, row.first_margins, strict=True), start=1):
        if token is not None:
            yield TEXTS[language]["tie" if is_tie(row, margin) else "differs"].format(
                row=row_name(row, language),
                prompt=prompt,
                prompts=len(row.first_differences),
                token=token + 1,
                margin=number(margin, ".2g"),
                difference=number(row.largest_logit_difference, ".2g"),
            )


def is_tie(row: MeasuredRow, margin: float | None) -> bool:
    """Whether a greedy token that differs is a tie: fp32 finds both tokens as good, and rounding can close its margin.

    Each of the two logits may be off by the largest difference that the row's logits have on the text.
    """
    off = row.largest_logit_difference
    return margin is not None and off is not None and margin <= min(2 * off, TIE)


def row_name(row: MeasuredRow, language: str = "en") -> str:
    """The name of a row in a sentence."""
    return TEXTS[language]["fixed" if row.fixed else "stock"].format(how=f"{row.dtype} {row.attention}")


def number(value: float | None, form: str) -> str:
    """A number, or a dash for one that is not known."""
    return "-" if value is None else format(value, form)
