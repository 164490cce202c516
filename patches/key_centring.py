"""The centre of the keys: one vector per key head that is subtracted before keys are rounded.

Qwen2's k_proj.bias has spikes. Float16 holds a key of 160 ± 0.5 in steps of 0.125, so it rounds away what a token adds
to the spike, in every attention backend. But softmax(q·(k_j - c)) is softmax(q·k_j - q·c), which is softmax(q·k_j): a
vector c that is the same for every key of a head changes nothing in real arithmetic. With c near the rotated bias, the
number that is left to round is the part that carries information.

Any constant c is exact. Which one is good depends on the bias and on RoPE alone, never on tokens, so causality, caching
and batching stay as they are. In a pair of frequency ω the rotated bias at position p is b·e^(iωp), and c = b·m there:

- m is the mean of e^(iωp) over the first radian of turning, at most WINDOW positions: a pair that has turned further
  points elsewhere, and the mean of a whole turn is 0.
- |m| is limited so that nowhere in the context the rest |e^(iωp) - m| passes √3. Stock rounds three times (projection,
  rotation, cache) and a fixed model once, so its error there is no larger than stock's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .caches import Witness
from .linears import is_separable, loaded_bias, may_change_bias
from .numerics import rotate

WINDOW = 4096
FARTHEST = 3.0**0.5


class CentredKeys(nn.Module):
    """An attention whose keys are centred, and whose queries and keys get their biases in fp32."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    head_dim: int
    projects_exactly = True  # whether its forward asks the projections for unrounded biases
    num_key_value_groups: int
    shift: Tensor | None = None  # 0 for queries, then -c for keys: (1, H + G, 1, D) in fp32, no buffer; None: no centre
    one: Tensor | None = None  # 1.0, (1,) in fp32; None without a shift
    witnesses: dict[int, Witness] | None = None  # by layer, shared by the layers of a model; see caches.py

    @property
    def key_shift(self) -> Tensor | None:
        """-c, (1, G, 1, D)."""
        if self.shift is None:
            return None
        key_heads = self.shift.shape[1] // (1 + self.num_key_value_groups)
        return self.shift[:, -key_heads:]

    def __setattr__(self, name: str, value: Any) -> None:
        """As nn.Module; an adapter that may change the bias of the keys ends the centre made for it."""
        if name == "k_proj" and isinstance(value, nn.Module) and may_change_bias(value):
            self.keep_constants(None)
        super().__setattr__(name, value)

    def on_unfixed(self) -> None:
        """Forgets the centre."""
        for constant in ("shift", "one", "witnesses"):
            self.__dict__.pop(constant, None)

    def centre_keys(self, inverse_frequencies: Tensor, positions: int, rotation_scale: float) -> None:
        """Chooses c for the bias as it is now. Without a bias, or with one that is not loaded, there is no centre.

        inverse_frequencies (head_dim/2,); positions: the longest context; rotation_scale multiplies cos and sin.
        """
        bias = None if may_change_bias(self.k_proj) else loaded_bias(self.k_proj)
        known = not inverse_frequencies.is_meta
        # With frequencies for a part of the head only, the rotation is not the one that c is made for.
        if bias is None or not known or 2 * len(inverse_frequencies) != self.head_dim:
            self.keep_constants(None)
            return
        frequencies = inverse_frequencies.cpu().double()  # in this order: not every device has fp64
        cos, sin = (torch.cat((x, x)) * rotation_scale for x in centre_factors(frequencies, positions))
        heads = bias.detach().cpu().double().view(1, -1, 1, self.head_dim)
        centre = rotate(heads, cos.view(1, 1, -1), sin.view(1, 1, -1))
        nothing = centre.new_zeros(1, centre.shape[1] * self.num_key_value_groups, 1, self.head_dim)
        self.keep_constants(torch.cat((nothing, -centre), dim=1).float(), bias.device)

    def keep_constants(self, shift: Tensor | None, device: torch.device | None = None) -> None:
        """Keeps a shift and `one` on `device`, or None for both. They are no buffers, so casts pass them by.

        A shift that is not finite is not kept: it would make every key of its head NaN.
        """
        if shift is not None:
            shift = shift.to(device) if shift.isfinite().all() else None
        held = self.shift
        if shift is not None and held is not None and shift.device == held.device and torch.equal(shift, held):
            return  # a captured graph may hold the old one
        self.__dict__["shift"] = shift
        self.__dict__["one"] = None if shift is None else shift.new_ones(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "CentredKeys":
        """Moves the centre along with the weights; casts pass it by."""
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        if self.shift is not None:
            moved = fn(torch.empty(0, device=self.shift.device))
            self.keep_constants(None if moved.is_meta else self.shift.to(moved.device))
        return self


def centre_factors(frequencies: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of m (see the top of this file) for each pair, (D/2,) each.

    frequencies (D/2,) in fp64, in radians a token; positions: the longest context.
    The mean of e^(iωp) over p < N is e^(iω(N-1)/2)·sin(Nω/2)/(N·sin(ω/2)) (Dirichlet's kernel), and 1 if ω is 0. Of
    the rest |e^(iφ) - r·e^(iα)|² = 1 - 2r·cos δ + r², with δ the largest |φ - α| in the context, follows the limit of
    r. With -ω, m is the conjugate.
    """
    speed = frequencies.abs()
    count = (1 / speed).floor().clamp(1, WINDOW)
    step = torch.sin(speed / 2)
    length = torch.where(step == 0, 1.0, torch.sin(count * speed / 2) / (count * step))
    angle = speed * (count - 1) / 2
    away = torch.maximum(angle, speed * positions - angle).clamp(max=torch.pi).cos()
    limited = torch.minimum(length, away + (away.square() + FARTHEST**2 - 1).sqrt())
    return limited * angle.cos(), limited * (angle * frequencies.sign()).sin()


def key_state(attention: CentredKeys) -> str:
    """What `status` says of a layer's keys."""
    if attention.shift is None:
        return "not centred"
    exact = attention.projects_exactly and is_separable(attention.q_proj) and is_separable(attention.k_proj)
    return "centred" if exact else "centred, bias rounded before"


def shift_for(attention: Any, cache: Any) -> Tensor | None:
    """The shift of this attention's heads. None for SinkCache, which rotates cached keys and their centre again."""
    shift: Tensor | None = attention.shift
    if shift is None or any(kind.__name__ == "SinkCache" for kind in type(cache).__mro__):
        return None
    return shift
