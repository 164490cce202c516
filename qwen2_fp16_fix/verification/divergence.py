"""How far a run's logits are from the oracle's, over the tokens of a text read in sliding windows.

The oracle is stock transformers in float32 with eager attention.
"""

import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import VerificationError, first_line

COMPARED = 2**22  # numbers compared at a time: 32 MiB in fp64


class Window(NamedTuple):
    """Tokens `start` to `end` are read together; those from `first` on are scored."""

    start: int
    end: int
    first: int

    @property
    def predictions(self) -> slice:
        """Where the window's logits predict the tokens that it scores: one place ahead of each."""
        return slice(self.first - 1 - self.start, self.end - 1 - self.start)


def sliding_windows(tokens: int, length: int, stride: int) -> list[Window]:
    """The windows of transformers' documentation, "Perplexity of fixed-length models", for a text of `tokens` tokens.

    Each starts `stride` tokens after the last and scores what the last did not reach, so every token but the text's
    first is scored once. 1 <= stride < length: with stride = length the first token of a window has no context.
    """
    found: list[Window] = []
    for start in range(0, tokens, stride):
        end = min(start + length, tokens)
        found.append(Window(start, end, found[-1].end if found else 1))
        if end == tokens:
            break
    return found


class OracleLogits:
    """The oracle's logits on disk, a file for each window: a vocabulary of 150,000 would fill memory."""

    def __init__(self, folder: Path, size: int) -> None:
        """folder: empty. size: how many numbers will be stored. Raises VerificationError if the disk has no room."""
        free = shutil.disk_usage(folder).free
        if 4 * size > free:
            raise VerificationError(
                f"the oracle's logits take {4 * size / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} GB free: "
                "lower the number of tokens, or set TMPDIR to a larger disk."
            )
        self.folder = folder

    def put(self, index: int, logits: Tensor) -> None:
        """Keeps the logits (N, vocabulary) of one window's scored tokens, in fp32. Raises VerificationError."""
        try:
            torch.save(logits.float().cpu().clone(), self.folder / f"{index}.pt")
        except (OSError, RuntimeError) as error:  # torch's own error for a disk that has filled up since
            raise VerificationError(
                f"the oracle's logits cannot be written to {self.folder.parent} ({first_line(error)}): free space, or "
                "set TMPDIR to a larger disk."
            ) from None

    def get(self, index: int) -> Tensor:
        """The logits of a window, mapped from the file."""
        found: Tensor = torch.load(self.folder / f"{index}.pt", mmap=True, weights_only=True)
        return found


class Divergence:
    """How far a run's logits are from the oracle's, summed over scored tokens."""

    def __init__(self) -> None:
        """Starts with no token."""
        self.tokens, self.agreeing = 0, 0
        self.loss, self.kl = 0.0, 0.0
        self.largest_kl, self.largest_difference = 0.0, 0.0

    def add(self, logits: Tensor, oracle: Tensor, targets: Tensor) -> None:
        """logits (N, vocabulary) and oracle (N, vocabulary) predict targets (N,); all of them finite.

        Losses and KL(oracle || run) are taken from fp64 log-softmaxes over the vocabulary, in nats.
        """
        rows = max(1, COMPARED // logits.shape[-1])
        parts = (torch.split(tensor, rows) for tensor in (logits, oracle, targets))
        for own, theirs, wanted in zip(*parts, strict=True):
            own, theirs = own.double(), theirs.to(own.device).double()
            log_q, log_p = own.log_softmax(-1), theirs.log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)  # rounding makes 0 a little negative
            self.tokens += len(wanted)
            self.loss -= float(log_q.gather(-1, wanted.to(own.device)[:, None]).sum())
            self.kl += float(kl.sum())
            self.agreeing += int((own.argmax(-1) == theirs.argmax(-1)).sum())
            self.largest_kl = max(self.largest_kl, float(kl.max()))
            self.largest_difference = max(self.largest_difference, float((own - theirs).abs().max()))

    def perplexity(self) -> float | None:
        """exp of the mean loss of a token, all tokens weighing the same; None if that passes the range of fp64."""
        try:
            return math.exp(self.loss / self.tokens)
        except OverflowError:
            return None

    def summary(self) -> dict[str, Any]:
        """The means and maxima, fit for JSON."""
        return {
            "perplexity": self.perplexity(),
            "kl_mean": self.kl / self.tokens,
            "kl_max": self.largest_kl,
            "top1_agreement": self.agreeing / self.tokens,
            "largest_logit_difference": self.largest_difference,
        }
