"""Linears whose input is scaled by a power of two and whose output is scaled back, in fp32, on its way to the residual.

A power of two is exact: nothing is rounded but what falls below float16's smallest number, 2^-24 of what is scaled.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import ShardedRangeError
from .linears import inner_linear
from .numerics import token_exponent

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what weights are that stand for themselves

#: The power of two by which quantised linears are handed more than magnitudes of 1. LLM.int8 keeps inputs above 6 in
#: float16, and activation scales that are fixed beforehand were measured unscaled: what is brought far below is lost.
#: Nothing is proven there; the worst layers published add up 28 times their largest input, 2^8 of which is a ninth of
#: float16's range.
QUANTISED_BITS = 8


class Scale(NamedTuple):
    """An exponent, and what its arithmetic needs on the device; exchanged whole, since other threads may be reading."""

    exponent: int
    zero: Tensor  # in float16, no dimensions
    factor: Tensor  # (1,) in fp32, 2 to the exponent: with a dimension, so that float16 times it is fp32


class Scaled(nn.Module):
    """A module with an exponent for its last linear: 0 for stock's arithmetic, None where no plan vouches for one."""

    scale: Scale | None = None

    @property
    def exponent(self) -> int | None:
        """Of `scale`."""
        return None if self.scale is None else self.scale.exponent

    def __setattr__(self, name: str, value: Any) -> None:
        """As nn.Module; a new child (an adapter, a quantised linear) ends the plan made for the old one."""
        if isinstance(value, nn.Module):
            self.set_exponent(None)
        super().__setattr__(name, value)

    def set_exponent(self, exponent: int | None, device: torch.device | None = None) -> None:
        """Takes the exponent of a plan, with the constants it needs on `device`: no buffers, so casts pass them by."""
        scale, held = None, self.scale
        if held is not None and held.exponent == exponent and held.zero.device == torch.device(device or "cpu"):
            return  # a captured graph may hold the old constants
        if exponent is not None:
            zero = torch.zeros((), dtype=torch.float16, device=device)
            scale = Scale(exponent, zero, torch.full((1,), 2.0**exponent, dtype=torch.float32, device=device))
        self.__dict__["scale"] = scale


def scaled_linear(linear: nn.Module, scaled: Tensor, factor: Tensor) -> Tensor:
    """linear(scaled) · factor, in fp32: one kernel after the matmul. The linear has no bias."""
    output: Tensor = linear(scaled) * factor
    return output


def linear_by_token(linear: nn.Module, activation: Tensor, width: int) -> Tensor:
    """linear(activation) with each token brought to magnitudes of at most 1 and its output brought back, in fp32.

    At most 2^QUANTISED_BITS, for a quantised linear.
    activation (B, S, channels) in fp32, of `width` channels when whole. Where it is a shard, the exponent is the
    largest over the ranks that share the token: the row-parallel reduction adds up what each of them has scaled.
    """
    exponent = token_exponent(activation.detach(), QUANTISED_BITS if is_quantised(linear) else 0)
    if activation.shape[-1] != width:
        exponent = largest_in_group(exponent, linear)
    scaled = (activation * power_of_two(-exponent)).to(torch.float16)
    if not has_bias(linear):
        product: Tensor = linear(scaled) * power_of_two(exponent)
        return product
    nothing = torch.zeros_like(scaled[:, :1])
    bias: Tensor = linear(nothing)  # which is not to be scaled back
    if trained := trained_biases(linear):
        # What a bias learns comes through the last term alone: through the others it is a difference of large numbers.
        output, rest = (torch.func.functional_call(linear, trained, (each,)) for each in (scaled, nothing))
    else:
        output, rest = linear(scaled), bias
    whole: Tensor = (output.float() - rest) * power_of_two(exponent) + bias
    return whole


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, exact, in fp32 whatever torch's default is. exponent: integers; returns the same shape.

    It is made apart, for a product: torch.ldexp of an activation by integers has gradients of 0 from torch 2.11 on.
    """
    exponent = exponent.float()
    return torch.ldexp(torch.ones_like(exponent), exponent)


def is_quantised(linear: nn.Module) -> bool:
    """Whether the weight of a linear, or of what an adapter wraps, is no floating-point number by itself."""
    return getattr(getattr(inner_linear(linear), "weight", None), "dtype", None) not in PLAIN


def casts_to_float16(linear: nn.Module, activation: Tensor) -> bool:
    """Whether a quantised linear casts this fp32 activation to float16: bitsandbytes' in 4 bit as told, in 8 always."""
    if activation.dtype != torch.float32:
        return False
    inner = inner_linear(linear)
    return getattr(inner, "compute_dtype", None) == torch.float16 or type(inner).__name__ == "Linear8bitLt"


def has_bias(linear: nn.Module) -> bool:
    """Whether a linear adds a bias: its own, or one of a quantised linear or an adapter that it wraps."""
    return any(getattr(module, "bias", None) is not None for module in linear.modules())


def trained_biases(linear: nn.Module) -> dict[str, Tensor]:
    """Zeros for each bias of a linear, or of what it wraps, that wants a gradient, by its name."""
    biases = ((name, value) for name, value in linear.named_parameters() if name.rpartition(".")[2] == "bias")
    return {name: torch.zeros_like(bias) for name, bias in biases if bias.requires_grad}


def largest_in_group(exponent: Tensor, linear: nn.Module) -> Tensor:
    """The largest exponent over the ranks with the other shards of `linear`, found by the device mesh.

    Its weight has it, or from transformers 5.3 to 5.14 the linear. Raises ShardedRangeError where neither has.
    """
    mesh = getattr(linear.weight, "device_mesh", None) or getattr(linear, "_hf_device_mesh", None)
    if mesh is None:
        raise ShardedRangeError(
            "this linear holds a shard of its weight and does not say which ranks hold the others, so its range cannot "
            "be kept in step with theirs: load the model with transformers' own tensor parallelism (tp_plan)."
        )
    exponent = exponent.contiguous()
    torch.distributed.all_reduce(exponent, torch.distributed.ReduceOp.MAX, group=mesh.get_group())
    return exponent
