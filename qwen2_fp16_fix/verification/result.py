"""The result of a verification: a row for each way of running the checkpoint, and whether they pass.

Attributes are named as the keys of the JSON. Its lists are tuples here. A number that is not finite or not known is
None.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..results import Record, Result
from ..status_result import Status
from .settings import Settings

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class MeasuredRow(Record):
    """One way of running the checkpoint, against the oracle: stock transformers in float32 with eager attention.

    The measures are None if its logits are not finite.

    finite: whether all logits are. kl_mean, kl_max: KL(oracle || row) of a token, in nats. first_overflow: the first
    site that is not finite, in the first window whose logits are not, or else in the first window; None if there is
    none. first_differences: for each prompt the index of the first greedy token that differs from the oracle's, or
    None. first_margins: for each of these, by how much the oracle's logit of its own token is above that of the row's
    token there; None where no token differs, or one of the texts has ended. seconds: of the windows' forwards.
    peak_bytes: see PeakMemory; None if it is not known.
    """

    name: str
    dtype: str
    attention: str
    fixed: bool
    finite: bool
    perplexity: float | None
    kl_mean: float | None
    kl_max: float | None
    top1_agreement: float | None
    largest_logit_difference: float | None
    first_overflow: str | None
    first_differences: tuple[int | None, ...]
    first_margins: tuple[float | None, ...]
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class VerifiedRow(MeasuredRow):
    """A measured row. drift: its perplexity over the oracle's, less 1."""

    drift: float | None


@dataclass(frozen=True, repr=False)
class VerificationResult(Result):
    """The result of `verify`.

    versions: of the software that ran. checkpoint: its path, or the class of a loaded model. rows: the oracle first.
    reasons: why it does not pass; empty if it passes. verdict: a sentence. seconds: of the whole verification.
    language: of the sentences and the table.
    """

    versions: Status
    checkpoint: str
    settings: Settings
    rows: tuple[VerifiedRow, ...]
    reasons: tuple[str, ...]
    passed: bool
    verdict: str
    seconds: float
    language: str = "en"

    def summary(self) -> str:
        """The verdict."""
        return self.verdict

    def __rich__(self) -> "RenderableType":
        """The table, the first site of each row that is not finite, and the verdict."""
        from .text import rendered

        return rendered(self)
