"""The request of a verification, and the settings that follow from it for a checkpoint."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..checkpoints.loading import default_device, device_problem
from ..errors import VerificationError
from ..results import Record
from ..translations import check_language

LONGEST_WINDOW = 1024  # unless asked for: eager attention stores a score for every pair of tokens


@dataclass(frozen=True)
class Settings(Record):
    """How a verification runs. tokens: of the text, at most. max_kl and max_ppl_drift: None for no threshold."""

    window: int
    stride: int
    tokens: int
    device: str
    max_kl: float | None
    max_ppl_drift: float | None


@dataclass(frozen=True)
class Request:
    """The arguments of `verify` besides the model. console: the one to show progress on, or None."""

    text: str | Path | None
    tokenizer: Any
    window: int | None
    stride: int | None
    tokens: int
    device: str | None
    max_kl: float | None
    max_ppl_drift: float | None
    resume: Path | None
    language: str
    console: Console | None

    def check(self) -> None:
        """Raises VerificationError for an unknown language, and a threshold that nothing or everything would pass."""
        check_language(self.language, VerificationError)
        for threshold in (self.max_kl, self.max_ppl_drift):
            if threshold is not None and not 0 <= threshold < math.inf:
                raise VerificationError(f"a threshold of {threshold} decides nothing: give a number of at least 0.")

    def settings(self, positions: int) -> Settings:
        """The settings with their defaults filled in. positions: how many tokens the model reads together.

        Raises VerificationError for settings that cannot be run.
        """
        window = min(LONGEST_WINDOW, positions) if self.window is None else self.window
        if not 2 <= window <= positions:
            raise VerificationError(
                f"a window of {window} tokens does not fit: give 2 to {positions}, the positions of this model."
            )
        stride = window // 2 if self.stride is None else self.stride
        if not 1 <= stride < window:
            raise VerificationError(f"a stride of {stride} does not fit a window of {window}: give 1 to {window - 1}.")
        if self.tokens < 2:
            raise VerificationError(f"{self.tokens} tokens are too few: give at least 2, of which one is scored.")
        return Settings(window, stride, self.tokens, choose_device(self.device), self.max_kl, self.max_ppl_drift)


def choose_device(device: str | None) -> str:
    """The device by its name; by default cuda if there is one. Raises VerificationError for one that is not there."""
    name = default_device() if device is None else device
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise VerificationError(f"{name!r} is not a device to verify on: give cpu or cuda.")
    if device_problem(name) is not None:
        raise VerificationError(f"there is no {name} here: give cpu, or leave the device out.")
    return name
