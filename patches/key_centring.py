"""The centre of the keys: one vector per key head that is subtracted before keys are rounded.

Qwen2's k_proj.bias has spikes: a few channels with a bias of 100 or more. Float16 holds a key of 160 ± 0.5 in steps of
0.125, so it rounds away what a token adds to the spike, in every attention backend. But softmax(q·(k_j - c)) is
softmax(q·k_j - q·c), which is softmax(q·k_j): a vector c that is the same for every key of a head changes nothing in
real arithmetic. With c near the rotated bias, the number that is left to round is the part that carries information.

Any constant c is exact. Which one is good depends on the bias and on RoPE alone, never on tokens, so causality, caching
and batching stay as they are. In a pair of frequency ω the rotated bias at position p is b·e^(iωp), and c = b·m there:

- m is the mean of e^(iωp) over the first radian of turning, at most WINDOW positions: a pair that has turned further
  points elsewhere, and the mean of a whole turn is 0.
- |m| is limited so that nowhere in the context the rest |e^(iωp) - m| exceeds √3. Stock rounds three times (projection,
  rotation, cache) and a fixed model once, so its error there is no larger than stock's.

Pairs where the rest is long as well are stored in two parts (two_part_keys.py), in caches that can hold them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cache_origin import Witness
from .linears import loaded_bias, may_change_bias
from .numerics import rotate
from .scaling import Ranges
from .two_part_keys import Split, choose_pairs

WINDOW = 4096
FARTHEST = 3.0**0.5


class Centre(NamedTuple):
    """What is subtracted from the keys of a layer, and the pairs that are stored in two parts. Replaced as a whole."""

    shift: Tensor  # 0 for queries, then -c for keys: (1, H + G, 1, D) in fp32
    split: Split | None
    version: int  # not 0; equal for equal centres and pairs, also in another process


class CentredKeys(nn.Module):
    """An attention whose keys are centred, and whose queries and keys get their biases in fp32."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    head_dim: int
    projects_exactly = True  # whether its forward asks the projections for unrounded biases
    num_key_value_groups: int
    centre: Centre | None = None  # its tensors are not buffers, so casts leave them alone
    ranges: Ranges = Ranges()  # exponents of the plan; see attention_form.py
    one_part: str | None = None  # why the last forward stored no pair in two parts, although the layer has such pairs
    witnesses: dict[int, Witness] | None = None  # by layer, shared by the layers of a model; see caches.py

    @property
    def shift(self) -> Tensor | None:
        """0 for queries, then -c for keys: (1, H + G, 1, D) in fp32; None: no centre."""
        return None if self.centre is None else self.centre.shift

    @property
    def key_shift(self) -> Tensor | None:
        """-c, (1, G, 1, D)."""
        if self.centre is None:
            return None
        key_heads = self.centre.shift.shape[1] // (1 + self.num_key_value_groups)
        return self.centre.shift[:, -key_heads:]

    def __setattr__(self, name: str, value: Any) -> None:
        """As nn.Module; an adapter that may change the bias of the keys ends the centre made for it."""
        if name == "k_proj" and isinstance(value, nn.Module) and may_change_bias(value):
            self.keep_centre(None)
        super().__setattr__(name, value)

    def on_unfixed(self) -> None:
        """Forgets the centre."""
        for constant in ("centre", "witnesses", "one_part"):
            self.__dict__.pop(constant, None)

    def centre_keys(self, inverse_frequencies: Tensor, positions: int, rotation_scale: float) -> None:
        """Chooses c, and the pairs to split, for the biases as they are now.

        Without a bias of the keys, or with one that is not loaded, there is no centre.
        inverse_frequencies (head_dim/2,); positions: the longest context; rotation_scale multiplies cos and sin.
        """
        bias = None if may_change_bias(self.k_proj) else loaded_bias(self.k_proj)
        known = not inverse_frequencies.is_meta
        # With frequencies for a part of the head only, the rotation is not the one that c is made for.
        if bias is None or not known or 2 * len(inverse_frequencies) != self.head_dim:
            self.keep_centre(None)
            return
        frequencies = inverse_frequencies.cpu().double()  # in this order: not every device has fp64
        cos, sin = (torch.cat((x, x)) * rotation_scale for x in centre_factors(frequencies, positions))
        heads = by_head(bias, self.head_dim)
        centre = rotate(heads.view(1, -1, 1, self.head_dim), cos.view(1, 1, -1), sin.view(1, 1, -1))
        nothing = centre.new_zeros(1, centre.shape[1] * self.num_key_value_groups, 1, self.head_dim)
        shift = torch.cat((nothing, -centre), dim=1).float()
        if not shift.isfinite().all():  # it would make every key of its head NaN
            self.keep_centre(None)
            return
        of_queries = loaded_bias(self.q_proj)
        queries = nothing[0, :, 0] if of_queries is None else by_head(of_queries, self.head_dim)
        rest = farthest_rests(frequencies, positions)
        split = choose_pairs(heads * rotation_scale, queries * rotation_scale, rest)
        told = shift.flatten().tolist() + ([] if split is None else split.channels.flatten().tolist())
        self.keep_centre(Centre(shift, split, hash(tuple(told)) | 1), bias.device)

    def keep_centre(self, centre: Centre | None, device: torch.device | None = None) -> None:
        """Keeps a centre on `device`, by default where it is."""
        if centre is not None:
            where, held = device or centre.shift.device, self.centre
            if held is not None and held.shift.device == where and held.version == centre.version:
                return  # a captured graph may hold the old one
            split = centre.split
            if split is not None:
                split = split._replace(channels=split.channels.to(where))
            centre = centre._replace(shift=centre.shift.to(where), split=split)
        self.__dict__["centre"] = centre

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "CentredKeys":
        """Moves the centre along with the weights; casts leave it alone."""
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        if self.centre is not None:
            moved = fn(torch.empty(0, device=self.centre.shift.device))
            self.keep_centre(None if moved.is_meta else self.centre, moved.device)
        return self


def by_head(bias: Tensor, head_dim: int) -> Tensor:
    """A bias as (heads, D), in fp64 on the CPU."""
    return bias.detach().cpu().double().view(-1, head_dim)


def centre_factors(frequencies: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of m (see the top of this file) for each pair, (D/2,) each.

    frequencies (D/2,) in fp64, in radians a token; positions: the longest context. With -ω, m is the conjugate.
    """
    length, angle, _ = polar_factors(frequencies, positions)
    return length * angle.cos(), length * (angle * frequencies.sign()).sin()


def farthest_rests(frequencies: Tensor, positions: int) -> Tensor:
    """The largest |e^(iωp) - m| of each pair in the context, (D/2,). Arguments as `centre_factors`."""
    length, _, away = polar_factors(frequencies, positions)
    return (1 - 2 * length * away + length.square()).clamp(min=0).sqrt()


def polar_factors(frequencies: Tensor, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Length r and angle α of m for each pair, and the cosine of the largest |φ - α| in the context; for |ω|.

    The mean of e^(iωp) over p < N is e^(iω(N-1)/2)·sin(Nω/2)/(N·sin(ω/2)) (Dirichlet's kernel), and 1 if ω is 0. Of
    the rest |e^(iφ) - r·e^(iα)|² = 1 - 2r·cos δ + r², with δ the largest |φ - α| in the context, follows the limit of
    r.
    """
    speed = frequencies.abs()
    count = (1 / speed).floor().clamp(1, WINDOW)
    step = torch.sin(speed / 2)
    length = torch.where(step == 0, 1.0, torch.sin(count * speed / 2) / (count * step))
    angle = speed * (count - 1) / 2
    away = torch.maximum(angle, speed * positions - angle).clamp(max=torch.pi).cos()
    return torch.minimum(length, away + (away.square() + FARTHEST**2 - 1).sqrt()), angle, away
