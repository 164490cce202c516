"""Linears whose input is scaled by a power of two and whose output is scaled back in fp32, as the residual needs it.

A power of two is exact: scaling rounds off only the part of a number that it brings below float16's smallest, 2^-24.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import ShardedRangeError
from .linears import inner_linear
from .numerics import token_exponent

#: dtypes whose numbers are the weights, with no scale beside them.
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: Quantised linears get inputs of at most 2^8, not 1. LLM.int8 keeps inputs above 6 in float16, and static activation
#: scales were measured on unscaled inputs: both lose inputs that are far smaller. There is no proof here: the largest
#: published sum is 28 times its largest input, and 28 · 2^8 is a ninth of float16's range.
QUANTISED_BITS = 8


class Ranges(NamedTuple):
    """Exponents of an attention that a plan chooses and that stay when the plan ends; 0 is stock."""

    input: int = 0  # q_proj, k_proj and v_proj read their input times 2^-input
    values: int = 0  # values, and so the outputs of the heads, are stored times 2^-values
    rotated: int = 0  # rotated queries and keys are stored times 2^-rotated each


class Scale(NamedTuple):
    """An exponent and its constants on the device. It is replaced as a whole, since other threads may be reading."""

    exponent: int
    zero: Tensor  # in float16, no dimensions
    factor: Tensor  # (1,) in fp32, 2 to the exponent: with a dimension, so that float16 times it is fp32


class Scaled(nn.Module):
    """A module with an exponent for its last linear.

    0: stock's arithmetic. None: no plan, each token is scaled by its own maximum.
    """

    scale: Scale | None = None

    @property
    def exponent(self) -> int | None:
        """Of `scale`."""
        return None if self.scale is None else self.scale.exponent

    def __setattr__(self, name: str, value: Any) -> None:
        """As nn.Module. A new child (an adapter, a quantised linear) ends the plan made for the old one."""
        if isinstance(value, nn.Module):
            self.set_exponent(None)
        super().__setattr__(name, value)

    def set_exponent(self, exponent: int | None, device: torch.device | None = None) -> None:
        """Keeps the exponent of a plan and its constants on `device`: not as buffers, which a cast would change."""
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
    """linear(activation), each token scaled to magnitudes of at most 1 and its output scaled back, in fp32.

    The limit is 2^QUANTISED_BITS for a quantised linear.
    activation (B, S, channels) in fp32, of `width` channels when whole. If it is a shard, the exponent is the largest
    over the ranks that share the token, since the row-parallel reduction adds their scaled outputs.
    """
    exponent = token_exponent(activation.detach(), QUANTISED_BITS if is_quantised(linear) else 0)
    if activation.shape[-1] != width:
        exponent = largest_in_group(exponent, linear)
    scaled = (activation * power_of_two(-exponent)).to(torch.float16)
    if not has_bias(linear):
        product: Tensor = linear(scaled) * power_of_two(exponent)
        return product
    nothing = torch.zeros_like(scaled[:, :1])
    bias: Tensor = linear(nothing)  # it must not be scaled back
    if trained := trained_biases(linear):
        # A bias gets its gradient from the last term alone; from the others it would be a difference of large numbers.
        output, rest = (torch.func.functional_call(linear, trained, (each,)) for each in (scaled, nothing))
    else:
        output, rest = linear(scaled), bias
    whole: Tensor = (output.float() - rest) * power_of_two(exponent) + bias
    return whole


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, exact, in fp32 whatever torch's default dtype is. exponent: integers; returns the same shape.

    Callers multiply by it. torch.ldexp of the activation itself would have gradients of 0 from torch 2.11 on.
    """
    exponent = exponent.float()
    return torch.ldexp(torch.ones_like(exponent), exponent)


def is_quantised(linear: nn.Module) -> bool:
    """Whether the weight of a linear, or of the linear that an adapter wraps, needs scales to be read."""
    return getattr(getattr(inner_linear(linear), "weight", None), "dtype", None) not in FLOAT_DTYPES


def holds_float16(linear: nn.Module) -> bool:
    """Whether the weight of a linear, or of the linear that an adapter wraps, is float16."""
    return getattr(getattr(inner_linear(linear), "weight", None), "dtype", None) == torch.float16


def casts_to_float16(linear: nn.Module, activation: Tensor) -> bool:
    """Whether a quantised linear casts this fp32 activation to float16.

    bitsandbytes' linears of 4 bit do if their compute_dtype is float16; those of 8 bit always do.
    """
    if activation.dtype != torch.float32:
        return False
    inner = inner_linear(linear)
    return getattr(inner, "compute_dtype", None) == torch.float16 or type(inner).__name__ == "Linear8bitLt"


def has_bias(linear: nn.Module) -> bool:
    """Whether a linear adds a bias, of its own or of a quantised linear or an adapter inside it."""
    return any(getattr(module, "bias", None) is not None for module in linear.modules())


def trained_biases(linear: nn.Module) -> dict[str, Tensor]:
    """Zeros for each trained bias of a linear, or of the linears inside it, by its name."""
    biases = ((name, value) for name, value in linear.named_parameters() if name.rpartition(".")[2] == "bias")
    return {name: torch.zeros_like(bias) for name, bias in biases if bias.requires_grad}


def largest_in_group(exponent: Tensor, linear: nn.Module) -> Tensor:
    """The largest exponent over the ranks that hold the other shards of `linear`.

    The device mesh names the ranks. The weight has it; from transformers 5.3 to 5.14 the linear has. Raises
    ShardedRangeError if neither has.
    """
    mesh = getattr(linear.weight, "device_mesh", None) or getattr(linear, "_hf_device_mesh", None)
    if mesh is None:
        raise ShardedRangeError(
            "this linear holds a shard of its weight and does not say which ranks hold the others, so it cannot be "
            "scaled as they are: load the model with transformers' own tensor parallelism (tp_plan)."
        )
    exponent = exponent.contiguous()
    torch.distributed.all_reduce(exponent, torch.distributed.ReduceOp.MAX, group=mesh.get_group())
    return exponent
