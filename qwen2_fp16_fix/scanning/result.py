"""The result of a scan: every site with its largest number, where float16 broke, outliers, and losses of int8.

Attributes are named as the keys of the JSON. Its lists are tuples here. A number that is not finite or not known is
None.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ScanError
from ..files.reading import to_path
from ..results import Record, Result
from ..status_result import Status

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Where(Record):
    """Where a number was, with the token there.

    A score also has a head and a key's token. It has no channel of its own: `channel` is the one that made most of it.
    """

    prompt: int
    position: int
    token_id: int
    token: str | None  # None without a tokenizer
    channel: int
    head: int | None = None
    key_position: int | None = None
    key_token_id: int | None = None
    key_token: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data. A number that is not a score has no keys of a score."""
        found = super().to_dict()
        if self.key_position is None:
            for name in ("head", "key_position", "key_token_id", "key_token"):
                del found[name]
        return found


class _Placed(Record):
    """A record with `where`: in `to_dict()` the fields of `where` lie among the record's own."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data. Without a `where` its keys are left out."""
        found: dict[str, Any] = {}
        for name, value in super().to_dict().items():
            found |= (value or {}) if name == "where" else {name: value}
        return found


@dataclass(frozen=True)
class MeasuredSite(_Placed):
    """A site of a layer, over all prompts. The ends (embedding, final norm, logits) have no layer.

    stored_as: the type the model keeps these numbers in; None for scores that a fused kernel keeps to itself.
    headroom_bits: log2 of that type's largest number over `largest`; None if a number is not finite.
    subnormal_share: of the numbers, those that float16 holds as subnormals. bound: proven by certify for any prompt.
    """

    layer: int | None
    site: str
    largest: float | None
    stored_as: str | None
    headroom_bits: float | None
    subnormal_share: float
    where: Where | None
    bound: float | None

    @property
    def past_limit(self) -> bool:
        """Whether the largest exceeds the type that it is stored in, or is not finite."""
        return self.headroom_bits is None or self.headroom_bits < 0


@dataclass(frozen=True)
class FirstNonfinite(_Placed):
    """The first site with a number that is not finite. exact: `largest` is that number as fp32 has it."""

    layer: int | None
    site: str
    largest: float | None
    stored_as: str | None
    where: Where | None
    exact: bool


@dataclass(frozen=True)
class MassiveActivation(_Placed):
    """A channel of the residual stream with massive activations: the largest, and the layers that have one."""

    magnitude: float | None
    layer: int
    where: Where
    layers: tuple[int, ...]


@dataclass(frozen=True)
class BiasSpike(Record):
    """A bias of q_proj or k_proj that is far from the median. One that is infinite in float16 has `bias` None."""

    layer: int
    projection: str
    head: int
    channel: int
    rotary_pair: int
    bias: float | None
    times_median: float | None


@dataclass(frozen=True)
class LinearInput(Record):
    """An input of linears. int8_loss: of its median channel, rounded to int8. feeds: the linears' names."""

    layer: int
    site: str
    feeds: str
    outlier_ratio: float | None
    int8_loss: float | None


@dataclass(frozen=True)
class Losses(Record):
    """The same measure for int8 and for int4."""

    int8: float
    int4: float


@dataclass(frozen=True)
class CacheLosses(Record):
    """The losses of a layer's cache. score_error: root mean square change of a score when keys are rounded."""

    layer: int
    keys: Losses | None
    score_error: Losses | None
    values: Losses | None


@dataclass(frozen=True)
class Quantisation(Record):
    """The losses of quantisation. keep_16_bit: layers with an int8 loss above `loss_limit`."""

    loss_limit: float
    linear_inputs: tuple[LinearInput, ...]
    cache: tuple[CacheLosses, ...]
    keep_16_bit: tuple[int, ...]


@dataclass(frozen=True)
class Proof(Record):
    """The result of `certify` for the same checkpoint, in short."""

    proven: bool
    verdict: str
    scaled_layers: int
    max_exponent: int


@dataclass(frozen=True)
class ScanSettings(Record):
    """How the scan ran. tokens: how many of each prompt were read at most."""

    fixed: bool
    attention: str
    tokens: int
    device: str


@dataclass(frozen=True)
class ScannedPrompt(Record):
    """A prompt: its text, or None if it was given as token ids, and how many tokens were read."""

    text: str | None
    tokens: int


@dataclass(frozen=True, repr=False)
class ScanResult(Result):
    """The result of `scan`.

    versions: of the software that ran. checkpoint: its path, or the class of a loaded model. foreign_code: the class of
    the checkpoint's own code, which loads in place of the scanned model, or None. model: the sizes. sites: in the order
    of execution. first_nonfinite: the site where the model broke; None if `finite`. bias_spikes: the largest of the
    `bias_spikes_found`. verdict: a sentence. seconds: of the whole scan. language: of the verdict and the table.
    """

    versions: Status
    checkpoint: str
    foreign_code: str | None
    settings: ScanSettings
    model: dict[str, int | float]
    prompts: tuple[ScannedPrompt, ...]
    sites: tuple[MeasuredSite, ...]
    first_nonfinite: FirstNonfinite | None
    finite: bool
    massive_activations: tuple[MassiveActivation, ...]
    bias_spikes: tuple[BiasSpike, ...]
    bias_spikes_found: int
    quantisation: Quantisation
    certificate: Proof
    verdict: str
    seconds: float
    language: str = "en"

    @property
    def past_limit(self) -> list[MeasuredSite]:
        """The sites whose largest exceeds the type that they are stored in, or is not finite."""
        return [site for site in self.sites if site.past_limit]

    @property
    def tightest(self) -> MeasuredSite:
        """The site with the least headroom."""
        return min(self.sites, key=headroom)

    def summary(self) -> str:
        """The verdict."""
        return self.verdict

    def __rich__(self) -> "RenderableType":
        """The tightest site of each layer, sentences about it, and the verdict."""
        from .sentences import rendered

        return rendered(self, self.language)

    def save_html(
        self,
        path: str | Path,
        *,
        verification: Result | None = None,
        language: str | None = None,
        force: bool = False,
        lang: str | None = None,
    ) -> None:
        """Writes the page that `scan --report` writes, for this scan alone. Needs the extra `report`.

        Args:
            path: The file to write.
            verification: A result of `verify`, which becomes a table of the page.
            language: "en" or "zh"; None for the language of the scan.
            force: Overwrites an existing file.
            lang: The older name of `language`.

        Raises:
            ScanError: The extra is not installed, the file cannot be written, or it exists and `force` is False.
        """
        verified = None if verification is None else verification.to_dict()
        _report_files().save(
            self, verified, force, report=to_path(path, ScanError), lang=language or lang or self.language
        )

    def save_png(
        self, path: str | Path, *, language: str | None = None, force: bool = False, lang: str | None = None
    ) -> None:
        """Writes the picture that `scan --png` writes, for this scan alone. Needs the extra `report`.

        Args:
            path: The file to write.
            language: "en" or "zh"; None for the language of the scan. Chinese needs a font with its letters.
            force: Overwrites an existing file.
            lang: The older name of `language`.

        Raises:
            ScanError: The extra is not installed, the file cannot be written, or it exists and `force` is False.
        """
        _report_files().save(self, None, force, png=to_path(path, ScanError), lang=language or lang or self.language)


def headroom(site: MeasuredSite) -> float:
    """A site's headroom as a number to compare: below all others if a number is not finite."""
    return -1e9 if site.headroom_bits is None else site.headroom_bits


def _report_files() -> Any:
    """The module report/files.py. It imports this package, so an import statement here would be circular."""
    return importlib.import_module("..report.files", __package__)
