"""The extremes of each site, and the first site with a number that is not finite.

Of a site: its largest magnitude, where that was, and how many numbers float16 could hold as subnormals only. Tensors
are measured in blocks, in fp32. Scores are multiplied out for a block of queries at a time and never whole.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .sites import Attended, SitePlace, Watch, execution_order, place_text

SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal
BLOCK = 2**21  # numbers measured at a time, 8 MiB in fp32
LARGE_BLOCK = 2**24  # on an accelerator, where each block costs a wait
ROWS_LOOKED_AT = 4096  # searched together for a number that is not finite


@dataclass(frozen=True)
class TokenPlace:
    """Where a number was. A score has its query's position, its key's, its head, and the channel that adds most to it.

    head and key_position are None for a number that is not a score.
    """

    prompt: int
    position: int
    channel: int
    head: int | None = None
    key_position: int | None = None


@dataclass
class Extremes:
    """The extremes of one site. After the first NaN or infinity `largest` stays that, and `spot` says where it was."""

    largest: float = 0.0
    spot: TokenPlace | None = None
    numbers: int = 0
    subnormal: int = 0
    dtype: torch.dtype | None = None

    @property
    def finite(self) -> bool:
        """Whether every number so far is finite."""
        return math.isfinite(self.largest)

    @property
    def subnormal_share(self) -> float:
        """The share of the numbers that are not zero and below float16's smallest normal number, 2^-14."""
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
                self.take(top, TokenPlace(prompt, first_position + start + row, first_channel + channel))

    def count(self, magnitudes: Tensor, scale: float = 1.0) -> None:
        """Counts the numbers, and those that are subnormal after multiplication by `scale`."""
        self.numbers += magnitudes.numel()
        below = int(torch.count_nonzero(magnitudes < SMALLEST_NORMAL / scale))
        if below:
            self.subnormal += below - (magnitudes.numel() - int(torch.count_nonzero(magnitudes)))  # zeros aside

    def exceeded(self, top: float) -> bool:
        """Whether `top` exceeds the largest so far. Always False after a NaN or infinity."""
        return self.finite and (math.isnan(top) or top > self.largest)

    def take(self, top: float, spot: TokenPlace) -> None:
        """Keeps a new largest magnitude."""
        self.largest, self.spot = top, spot


class Break(NamedTuple):
    """The first site, in the order of execution, with a number that is not finite, and where that number was."""

    place: SitePlace
    spot: TokenPlace | None


class FirstBreak:
    """Looks for the first site with a number that is not finite. A later prompt may break an earlier site."""

    def __init__(self) -> None:
        """Starts with no site found."""
        self.found: Break | None = None

    def look(self, place: SitePlace, tensor: Tensor, prompt: int = 0) -> None:
        """Looks at tensor (1, S, channels) or (1, H, S, K), of one prompt, unless an earlier site is known."""
        if not self._precedes(place):
            return
        rows = tensor.flatten(0, -2)
        if not all(bool(part.isfinite().all()) for part in torch.split(rows, ROWS_LOOKED_AT)):
            row, channel = divmod(int((~rows.isfinite()).byte().argmax()), rows.shape[1])
            self.take(place, TokenPlace(prompt, row % tensor.shape[-2], channel))

    def take(self, place: SitePlace, spot: TokenPlace | None) -> None:
        """Keeps a site that is not finite, unless an earlier one is known."""
        if self._precedes(place):
            self.found = Break(place, spot)

    def _precedes(self, place: SitePlace) -> bool:
        return self.found is None or execution_order(place) < execution_order(self.found.place)


def first_break(sites: Mapping[SitePlace, Extremes]) -> Break | None:
    """The break among sites that have been measured."""
    first = FirstBreak()
    for place, extremes in sites.items():
        if not extremes.finite:
            first.take(place, extremes.spot)
    return first.found


class Magnitudes(Watch):
    """While entered, records |x| at every site of every layer of `model`, by the site's name in messages.

    The largest magnitude of a site is NaN or infinite once a number there is.
    """

    def __init__(self, model: nn.Module) -> None:
        """model: any module with a Qwen2Model inside."""
        layers: Any = next(module.layers for module in model.modules() if hasattr(module, "layers"))
        super().__init__(dict(enumerate(layers)), self.note)
        self.found: dict[str, float] = {}
        self.first = FirstBreak()

    def note(self, place: SitePlace, tensor: Tensor) -> None:
        """Records the largest |tensor|, NaN if there is one."""
        self.first.look(place, tensor)
        largest = float(torch.abs(tensor.float()).max())
        before = self.found.get(str(place), 0.0)
        self.found[str(place)] = largest if math.isnan(largest) or largest > before else before

    def largest(self, count: int) -> list[dict[str, Any]]:
        """The `count` sites with the largest magnitudes, largest first."""
        ranked = sorted(self.found.items(), key=lambda item: -item[1])[:count]
        return [{"site": site, "magnitude": magnitude} for site, magnitude in ranked]

    def first_overflow(self) -> str | None:
        """The first site with a number that is not finite, in the order of execution, by its name in messages."""
        return None if self.first.found is None else str(self.first.found.place)


def overflow_lines(rows: Iterable[tuple[str, str | None]], texts: Mapping[str, str], language: str = "en") -> list[str]:
    """A line for each row that was not finite. rows: the name of each, and its first site that was not, or None.

    texts: of the language, with the key "broken".
    """
    found = [(name, place_text(site, language)) for name, site in rows if site is not None]
    return [texts["broken"].format(row=name, place=place) for name, place in found]


def blocks(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Some of the rows (R, channels) at a time, with the number of the first."""
    size = max(1, block_size(rows.device) // max(1, rows.shape[1]))
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]


def block_size(device: torch.device) -> int:
    """How many numbers to measure at a time."""
    return BLOCK if device.type == "cpu" else LARGE_BLOCK


def index_of_largest(magnitudes: Tensor) -> int:
    """The index of the largest in the flattened tensor; of the first NaN or infinity if there is one."""
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
                self._note(magnitudes, block, key, TokenPlace(prompt, start, 0, group * shared), attended.scaling)

    def _note(self, magnitudes: Tensor, block: Tensor, key: Tensor, corner: TokenPlace, scaling: float) -> None:
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
