"""Obstacles to quantisation: massive activations, bias spikes and outlier channels. And the losses of int8 and int4.

The measures are simple on purpose. Rounding is symmetric. Each token has one scale, its largest magnitude over 127 or
7; in a cache each head of a token has its own. The loss of a channel is the root mean square of its rounding error over
that of its values. The median over the channels tells how much an ordinary channel loses because another one is large.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..activations.extremes import blocks
from ..activations.sites import Attended
from ..patches.linears import loaded_bias
from .result import BiasSpike

MASSIVE, TIMES_MEDIAN = 100.0, 1000.0  # Sun et al. 2024, section 2: above both is a massive activation
SPIKE = 20.0  # times the median magnitude of a bias
LOSS_LIMIT = 0.1  # an int8 loss from which a layer is better left in 16 bit
SAMPLE = 2**16  # numbers that a median is taken from
LAST_QUERIES = 64  # queries of a prompt whose scores are compared


def rounded(rows: Tensor, levels: int) -> Tensor:
    """rows (..., channels) in fp32, each rounded to one of 2·levels + 1 values, with a scale of its own."""
    scale = (rows.abs().amax(-1, keepdim=True) / levels).clamp(min=torch.finfo(torch.float32).tiny)
    return (rows / scale).round_().mul_(scale)


class LossSummary(NamedTuple):
    """The median channel's loss, and the largest magnitude over the median of the channels' largest."""

    median: float
    outlier_ratio: float


class CacheSummary(NamedTuple):
    """The losses of a layer's cache in int8 and int4: of keys, of values, and how far scores move."""

    keys: dict[str, float] | None
    score_error: dict[str, float] | None
    values: dict[str, float]


@dataclass
class RoundingLoss:
    """The loss of rows that are rounded one by one, over all prompts."""

    levels: int
    error: Tensor | None = None  # sums of squares, by channel
    power: Tensor | None = None
    largest: Tensor | None = None

    def add(self, tensor: Tensor) -> None:
        """tensor (..., rows, channels)."""
        for _, block in blocks(tensor.reshape(-1, tensor.shape[-1])):
            exact = block.float()
            error = (exact - rounded(exact, self.levels)).square_().sum(0).cpu().double()
            power = exact.square().sum(0).cpu().double()
            largest = exact.abs().amax(0).cpu()
            if self.error is None or self.power is None or self.largest is None:
                self.error, self.power, self.largest = error, power, largest
            else:
                self.error += error
                self.power += power
                self.largest = torch.maximum(self.largest, largest)

    def summary(self) -> LossSummary:
        """The loss of the median channel, and how far outliers stand out."""
        return LossSummary(median_loss([self]), self.outlier_ratio())

    def outlier_ratio(self) -> float:
        """The largest magnitude over the median of the channels' largest."""
        assert self.largest is not None
        middle = float(self.largest.median())
        return float(self.largest.max()) / middle if middle else 0.0


def median_loss(parts: list[RoundingLoss]) -> float:
    """The loss of the median channel over all parts. Channels that are zero throughout do not count."""
    error = torch.cat([part.error for part in parts if part.error is not None])
    power = torch.cat([part.power for part in parts if part.power is not None])
    alive = power != 0  # True for NaN, too
    return float((error[alive] / power[alive]).sqrt().median()) if bool(alive.any()) else 0.0


class CacheLoss:
    """The losses of a layer's keys or values in a cache of int8 and of int4."""

    def __init__(self) -> None:
        """Starts empty."""
        self.heads: dict[int, list[RoundingLoss]] = {127: [], 7: []}
        self.score_error: dict[int, list[float]] = {127: [], 7: []}

    @property
    def seen(self) -> bool:
        """Whether any states were added."""
        return bool(self.heads[127])

    def add(self, states: Tensor) -> None:
        """states (1, G, S, D)."""
        for levels, parts in self.heads.items():
            parts.extend(RoundingLoss(levels) for _ in range(states.shape[1] - len(parts)))
            for part, head in zip(parts, states[0], strict=True):
                part.add(head)

    def add_scores(self, attended: Attended) -> None:
        """Change of the last queries' scores when keys are rounded, less its mean over the keys.

        A softmax does not see a shift that all keys have in common.
        """
        count = min(LAST_QUERIES, attended.query.shape[2])
        shared = attended.query.shape[1] // attended.key.shape[1]
        query = (attended.query[0, :, -count:].float() * attended.scaling).reshape(
            len(attended.key[0]), shared * count, -1
        )
        key = attended.key[0].float()
        hidden = torch.ones(count, key.shape[1], dtype=torch.bool, device=key.device).triu(key.shape[1] - count + 1)
        for levels, errors in self.score_error.items():
            moved = query @ (rounded(key, levels) - key).transpose(1, 2)
            moved = moved.view(len(key), shared, *hidden.shape).masked_fill(hidden, 0.0)
            seen = (~hidden).sum(-1, keepdim=True)
            moved = (moved - moved.sum(-1, keepdim=True) / seen).masked_fill(hidden, 0.0)
            errors.append(float(moved.square().sum() / (seen.sum() * moved[..., 0, 0].numel())))

    def summary(self) -> dict[str, float]:
        """`int8` and `int4`: the median channel's loss."""
        return {f"int{bits}": median_loss(self.heads[levels]) for bits, levels in ((8, 127), (4, 7))}

    def score_summary(self) -> dict[str, float]:
        """`int8` and `int4`: root mean square error of a score, in units of the scores."""
        means = {bits: self.score_error[levels] for bits, levels in ((8, 127), (4, 7))}
        return {f"int{bits}": (sum(found) / len(found)) ** 0.5 if found else 0.0 for bits, found in means.items()}


@dataclass
class MassiveChannel:
    """A residual channel with massive activations: its largest, where that was, and the layers that have one."""

    magnitude: float
    layer: int
    prompt: int
    position: int
    layers: set[int] = field(default_factory=set)


class MassiveActivations:
    """The massive activations of the residual stream, by channel."""

    def __init__(self) -> None:
        """Starts empty."""
        self.channels: dict[int, MassiveChannel] = {}

    def add(self, layer: int, prompt: int, residual: Tensor) -> None:
        """residual (1, S, hidden), after a layer."""
        rows = residual[0]
        flat = rows.reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)].float().abs()
        limit = max(MASSIVE, TIMES_MEDIAN * float(sample.median()))
        tops, positions = rows.abs().max(0)
        for channel in torch.nonzero(tops.float() > limit).flatten().tolist():
            magnitude = float(tops[channel])
            known = self.channels.get(channel)
            if known is None or magnitude > known.magnitude:
                layers = set() if known is None else known.layers
                known = MassiveChannel(magnitude, layer, prompt, int(positions[channel]), layers)
                self.channels[channel] = known
            known.layers.add(layer)


def bias_spikes(number: int, attention: Any) -> list[BiasSpike]:
    """The biases of q_proj and k_proj that are more than SPIKE times the median of theirs, largest first."""
    found = []
    for name in ("q_proj", "k_proj"):
        projection: nn.Module = getattr(attention, name)
        bias = loaded_bias(projection)
        if bias is None:
            continue
        bias = bias.detach().float().cpu()
        magnitudes = bias.abs()
        limit = SPIKE * float(magnitudes.median())
        for index in torch.nonzero(magnitudes > limit).flatten().tolist():
            head, channel = divmod(index, attention.head_dim)
            found.append(
                BiasSpike(
                    layer=number,
                    projection=name,
                    head=head,
                    channel=channel,
                    rotary_pair=channel % (attention.head_dim // 2),
                    bias=float(bias[index]),
                    times_median=float(magnitudes[index]) / (limit / SPIKE) if limit else None,
                )
            )
    return sorted(found, key=lambda spike: -abs(spike.bias or 0.0))
