"""Keys that 16 bit can hold: the bias is added in fp32, and one vector per key head is taken off before rounding.

Qwen2's k_proj.bias has spikes. A key of 160 ± 0.5 has a step of 0.125 in float16, so what it says beside the spike is
rounded away, in every attention backend. But softmax(q·(k_j - c)) is softmax(q·k_j - q·c), which is softmax(q·k_j): a
vector c that is the same for every key of a head changes nothing in real arithmetic. With c near the rotated bias, what
is left to round is the part that carries information.

Any constant c is exact. Which one is good depends on the bias and on RoPE alone, never on tokens, so causality, caching
and batching are untouched. In a pair of frequency ω the rotated bias at position p is b·e^(iωp), and c = b·m there:

- m is the mean of e^(iωp) over the first radian of turning, at most WINDOW positions: a pair that has turned further
  points elsewhere, and a mean over that points nowhere.
- |m| is limited so that nowhere in the context the rest |e^(iωp) - m| passes √3. Stock rounds three times (projection,
  rotation, cache) where we round once, so the error there is no larger than stock's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .caches import Witness
from .linears import LINEAR_FORWARD, is_separable, loaded_bias, may_change_bias, project
from .numerics import is_unwatched, rotate

WINDOW = 4096
FARTHEST = 3.0**0.5


class CentredKeys(nn.Module):
    """An attention whose queries and keys get their biases in fp32, and whose keys are centred."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    head_dim: int
    projects_exactly = True  # whether its forward asks the projections for unrounded biases
    num_key_value_groups: int
    shift: Tensor | None = None  # 0 for queries, then -c: (1, H + G, 1, D) in fp32, no buffer; None takes nothing off
    one: Tensor | None = None  # 1.0, (1,) in fp32; there with a shift
    witnesses: dict[int, Witness] | None = None  # of every layer of the model: they tell whose keys a cache holds

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

    def release(self) -> None:
        """Forgets the centre."""
        for constant in ("shift", "one", "witnesses"):
            self.__dict__.pop(constant, None)

    def centre_keys(self, inverse_frequencies: Tensor, positions: int, rotation_scale: float) -> None:
        """Chooses c for the bias as it is now; without a bias, or one that is not loaded, there is nothing to take off.

        inverse_frequencies (head_dim/2,); positions: the longest context; rotation_scale multiplies cos and sin.
        """
        bias = None if may_change_bias(self.k_proj) else loaded_bias(self.k_proj)
        known = not inverse_frequencies.is_meta  # and of a part of the head stock itself makes nothing
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
        """Takes a shift, or none, to `device`, with what goes with it: no buffers, so casts pass them by.

        One that is not finite is none: it would take the whole head with it.
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


def rotated_projections(
    attention: Any, hidden_states: Tensor, cos: Tensor, sin: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, H, S, D) in fp32, key and value (B, G, S, D) in the dtype of the matmuls, of `hidden_states`
    (B, S, hidden); query and key rotated in fp32, keys shifted (see `shift_for`) and rounded once.
    """
    turned = rotate(queries_and_keys(attention, hidden_states), cos, sin, shift)
    value = attention.v_proj(hidden_states).view(*hidden_states.shape[:-1], -1, attention.head_dim).transpose(1, 2)
    query, key = turned.split_with_sizes((turned.shape[1] - value.shape[1], value.shape[1]), dim=1)
    return query, key.to(value.dtype), value


def queries_and_keys(attention: Any, hidden_states: Tensor) -> Tensor:
    """The heads of q_proj and then those of k_proj, (B, H + G, S, D), for one rotation; fp32 where biases are exact."""
    q_proj, k_proj, head_dim = attention.q_proj, attention.k_proj, attention.head_dim
    batch, length, _ = hidden_states.shape
    if attention.one is None or not (can_write(q_proj) and can_write(k_proj) and is_unwatched(q_proj, k_proj)):
        by_head = (batch, length, -1, head_dim)
        return torch.cat([project(each, hidden_states).view(by_head).transpose(1, 2) for each in (q_proj, k_proj)], 1)
    if attention.one.device != hidden_states.device:  # the weights were dispatched one by one, and nobody told
        attention.keep_constants(attention.shift, hidden_states.device)
    sizes = [q_proj.out_features // head_dim, k_proj.out_features // head_dim]
    heads = torch.empty((batch, sum(sizes), length, head_dim), dtype=torch.float32, device=hidden_states.device)
    queries, keys = heads.split_with_sizes(sizes, 1)
    write(q_proj, hidden_states, queries, attention.one)
    write(k_proj, hidden_states, keys, attention.one)
    return heads


def can_write(projection: Any) -> bool:
    """Whether a projection is a plain linear with a bias, and with a weight that no rank has only a shard of."""
    if type(projection) is not nn.Linear or nn.Linear.forward is not LINEAR_FORWARD:
        return False
    parameters = projection._parameters  # without its weight in a replica, a flat shard or under pruning
    return type(parameters.get("weight")) is nn.Parameter and parameters.get("bias") is not None


def write(linear: nn.Linear, hidden_states: Tensor, heads: Tensor, one: Tensor) -> None:
    """linear(hidden_states) with its bias added in fp32, put into fp32 heads (B, H, S, D).

    one: 1.0 in fp32, (1,); times it, the bias is fp32 within the kernel that adds it.
    """
    batch, _, length, head_dim = heads.shape
    product = nn.functional.linear(hidden_states, linear.weight).view(batch, length, -1, head_dim)
    torch.addcmul(product.transpose(1, 2), linear.bias.view(-1, 1, head_dim), one, out=heads)


def centre_factors(frequencies: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of m (see above) for each pair. frequencies (D/2,) in fp64, in radians a token.

    The mean of e^(iωp) over p < N is e^(iω(N-1)/2)·sin(Nω/2)/(N·sin(ω/2)) (Dirichlet's kernel), and 1 where ω is 0. Of
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
    """The shift of this attention's heads. None for a cache that turns its keys later: then c would be no constant."""
    shift: Tensor | None = attention.shift
    if shift is None or any(kind.__name__ == "SinkCache" for kind in type(cache).__mro__):
        return None
    return shift
