"""The extremes of a site: its largest magnitude and where that was, and how much float16 could hold as subnormals only.

Tensors are measured in blocks, in fp32. Scores are multiplied out for a block of queries at a time and never whole.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .sites import Attended

SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal
BLOCK = 2**21  # numbers measured at a time, 8 MiB in fp32
LARGE_BLOCK = 2**24  # on an accelerator, where each block costs a wait


@dataclass(frozen=True)
class Spot:
    """Where a number was. Of a score: its query's position, the key's, the head, and the channel that made most of it.

    head and key_position are None for what is no score.
    """

    prompt: int
    position: int
    channel: int
    head: int | None = None
    key_position: int | None = None


@dataclass
class Extremes:
    """What is kept of one site. `largest` is NaN or infinite once a number was; `spot` is then the first such one's."""

    largest: float = 0.0
    spot: Spot | None = None
    numbers: int = 0
    subnormal: int = 0
    dtype: torch.dtype | None = None

    @property
    def finite(self) -> bool:
        """Whether every number so far was."""
        return math.isfinite(self.largest)

    @property
    def subnormal_share(self) -> float:
        """Of the numbers, those that are not zero and below float16's smallest normal number, 2^-14."""
        return self.subnormal / self.numbers if self.numbers else 0.0

    def add(self, tensor: Tensor, prompt: int, first_channel: int = 0, first_position: int = 0) -> None:
        """tensor (1, S, channels), of one prompt; it may be a part, from a channel and a position on."""
        self.dtype = tensor.dtype
        rows = tensor.reshape(-1, tensor.shape[-1])
        for start, block in blocks(rows):
            magnitudes = block.abs().float()  # not in place: an fp32 block is the model's own
            self.count(magnitudes)
            if self.exceeded(top := float(magnitudes.amax())):
                index = index_of_largest(magnitudes)
                row, channel = divmod(index, rows.shape[1])
                self.take(top, Spot(prompt, first_position + start + row, first_channel + channel))

    def count(self, magnitudes: Tensor, scale: float = 1.0) -> None:
        """Counts the numbers, and the subnormal ones once they are multiplied by `scale`."""
        self.numbers += magnitudes.numel()
        below = int(torch.count_nonzero(magnitudes < SMALLEST_NORMAL / scale))
        if below:
            self.subnormal += below - (magnitudes.numel() - int(torch.count_nonzero(magnitudes)))  # zeros aside

    def exceeded(self, top: float) -> bool:
        """Whether `top` is news. After a number that is not finite nothing is."""
        return self.finite and (math.isnan(top) or top > self.largest)

    def take(self, top: float, spot: Spot) -> None:
        """Keeps a new largest magnitude."""
        self.largest, self.spot = top, spot


def blocks(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Some of the rows (R, channels) at a time, with the number of the first."""
    size = max(1, block_size(rows.device) // max(1, rows.shape[1]))
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]


def block_size(device: torch.device) -> int:
    """How many numbers to measure at a time."""
    return BLOCK if device.type == "cpu" else LARGE_BLOCK


def index_of_largest(magnitudes: Tensor) -> int:
    """Where the largest is in the flattened tensor; the first that is not a number or infinite where there is one."""
    flat = magnitudes.flatten()
    odd = ~flat.isfinite()
    return int((odd.byte() if bool(odd.any()) else flat).argmax())


@dataclass
class ScoreExtremes:
    """The extremes of the raw scores q·k of a layer, over every pair of tokens as eager computes them, and scaled."""

    raw: Extremes = field(default_factory=Extremes)
    scaled: Extremes = field(default_factory=Extremes)

    def add(self, attended: Attended, prompt: int) -> None:
        """Multiplies out the scores of one prompt, some queries at a time."""
        for group, key in enumerate(attended.key[0].float()):
            shared = attended.query.shape[1] // attended.key.shape[1]
            queries = attended.query[0, group * shared : (group + 1) * shared]
            size = max(1, block_size(key.device) // (shared * len(key)))
            for start in range(0, queries.shape[1], size):
                block = queries[:, start : start + size].float()
                magnitudes = (block.reshape(-1, block.shape[-1]) @ key.T).abs_()
                self._note(magnitudes, block, key, Spot(prompt, start, 0, group * shared), attended.scaling)

    def _note(self, magnitudes: Tensor, block: Tensor, key: Tensor, corner: Spot, scaling: float) -> None:
        """magnitudes (shared heads · queries, K) of a block (shared heads, queries, D); corner: of its first query."""
        self.raw.count(magnitudes)
        self.scaled.count(magnitudes, scaling)
        if not self.raw.exceeded(top := float(magnitudes.amax())):
            return
        row, position = divmod(index_of_largest(magnitudes), len(key))
        head, query = divmod(row, block.shape[1])
        channel = int((block[head, query] * key[position]).abs().argmax())
        assert corner.head is not None
        spot = replace(
            corner,
            position=corner.position + query,
            channel=channel,
            head=corner.head + head,
            key_position=position,
        )
        self.raw.take(top, spot)
        self.scaled.take(top * scaling, spot)
