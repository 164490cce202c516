"""What a verification returns: a row for each way of running the checkpoint, and whether they pass.

Attributes are named as the keys of the JSON. Lists are tuples here. What is not finite or not known is None.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..model_status import Status
from ..results import Record, Result
from .settings import Settings

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class MeasuredRow(Record):
    """One way of running the checkpoint, against the oracle. All but its name is None where its logits are not finite.

    finite: all logits are. kl_mean, kl_max: KL(oracle || row) of a token, in nats. first_overflow: the first site that
    is not finite, in the first window whose logits are not, or else in the first window. first_differences: for each
    prompt the first greedy token that differs from the oracle's, or None. seconds: of the windows' forwards.
    peak_bytes: see PeakMemory.
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
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class VerifiedRow(MeasuredRow):
    """A measured row with the drift of its perplexity from the oracle's, relatively."""

    drift: float | None


@dataclass(frozen=True, repr=False)
class VerificationResult(Result):
    """What `verify` returns. versions: what ran. reasons: why it does not pass, if so. verdict: a sentence."""

    versions: Status
    checkpoint: str
    settings: Settings
    rows: tuple[VerifiedRow, ...]
    reasons: tuple[str, ...]
    passed: bool
    verdict: str
    seconds: float

    def summary(self) -> str:
        """The verdict."""
        return self.verdict

    def __rich__(self) -> "RenderableType":
        """The table, where each row first was not finite, and the verdict."""
        from .text import rendered

        return rendered(self)
