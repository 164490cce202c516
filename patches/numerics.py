"""The arithmetic of the fix, as plain functions of tensors. Nothing here knows transformers.

Notation in shapes: B batch, H query heads, G key heads (H is a multiple of G), Q queries, K keys, D head_dim.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import autocast
from .autograd import backward_through, is_recorded, is_transformed

#: Devices whose addcmul multiplies in fp32, its factor included, and rounds once; ROCm calls itself cuda. torch's MPS
#: has rounded each product to the operands' type, so that 300 · 300 · 2^-3 is infinite there.
ONE_KERNEL = ("cpu", "cuda", "xpu")
#: Devices whose softmax may be written over its own input, and whose baddbmm ignores its first operand if beta is 0.
IN_PLACE = ("cpu", "cuda")
#: Devices known to have a kernel for torch.frexp. MPS has none.
FREXP = ("cpu", "cuda")


def device_of(tensor: Tensor) -> str:
    """The kind of device a tensor is on, as torch calls it."""
    return tensor.device.type


def runs_on_cpu(tensor: Tensor) -> bool:
    """Whether a tensor is on a CPU, where torch's float16 kernels compute one number at a time and fp32 is fast."""
    return tensor.device.type == "cpu"


def may_reuse_memory(*modules: nn.Module) -> bool:
    """Whether the caller may write over what these modules return: no autograd, compiler or hook keeps it."""
    everywhere = nn.modules.module
    if torch.is_grad_enabled() or is_recorded() or is_transformed():
        return False
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return False
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return False
    return True


def promote_residual(hidden_states: Tensor) -> Tensor:
    """The residual stream in fp32 if it comes in float16; any other dtype unchanged.

    One promotion is enough: `fp32 residual + float16 block output` stays fp32 by PyTorch's type promotion.
    """
    return hidden_states.float() if hidden_states.dtype == torch.float16 else hidden_states


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019, eq. 4), normalised and multiplied by the gain in fp32, rounded once.

    hidden_states (..., hidden) and weight (hidden,), any float dtype; returns (..., hidden) in `out_dtype`.
    """
    hidden_states = hidden_states.float()
    if has_fused_norm(device_of(hidden_states)):
        return torch.nn.functional.rms_norm(hidden_states, weight.shape, weight.float(), eps).to(out_dtype)
    length = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True)
    keeps_nothing = type(hidden_states) is Tensor and may_reuse_memory()
    epsilon = constant(eps, hidden_states.device) if keeps_nothing else length.new_full((), eps)
    mean_square = torch.addcmul(epsilon, length, length, value=1 / weight.numel())
    if not keeps_nothing:
        return (hidden_states * mean_square.rsqrt() * weight).to(out_dtype)
    normed = hidden_states * mean_square.rsqrt_()
    if runs_on_cpu(normed) or device_of(normed) not in ONE_KERNEL:
        return normed.mul_(weight).to(out_dtype)
    return torch.mul(normed, weight, out=torch.empty_like(normed, dtype=out_dtype))


def has_fused_norm(device_type: str) -> bool:
    """Whether torch has one kernel for F.rms_norm on such devices. Where it has none, F.rms_norm runs in six parts.

    2.10 has it for CUDA; 2.8 has the operator without that kernel. Compilers get parts, which they fuse themselves.
    """
    return not torch.compiler.is_compiling() and _has_kernel("aten::_fused_rms_norm", device_type.upper())


@functools.lru_cache
def _has_kernel(operator: str, key: str) -> bool:
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)
    except RuntimeError:  # this torch has no such operator, or no such devices
        return False


@functools.lru_cache
def constant(value: float, device: torch.device) -> Tensor:
    """A number in fp32 on a device, without dimensions; made once, since making it is a kernel."""
    return torch.full((), value, dtype=torch.float32, device=device)


def rotate(states: Tensor, cos: Tensor, sin: Tensor, shift: Tensor | None = None) -> Tensor:
    """Rotary position embedding (Su et al. 2021, eq. 34, in the half-split layout), plus `shift`, in fp32.

    states (B, heads, S, D); cos and sin (B or 1, S, D) in fp32; shift (1, heads, 1, D) in fp32. Returns fp32.
    """
    cos, exact = cos.unsqueeze(1), states.float()
    turned = exact * cos if shift is None else torch.addcmul(shift.to(exact.device), exact, cos)
    (left, right), (sin_left, sin_right) = exact.chunk(2, -1), sin.unsqueeze(1).chunk(2, -1)
    half = left.shape[-1]
    turned.narrow(-1, 0, half).addcmul_(right, sin_left, value=-1)  # autograd forbids writing into a chunk
    turned.narrow(-1, half, half).addcmul_(left, sin_right)
    return turned


def laid_out_by_token(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """heads (B, H, S, D) cast to `dtype`, in the memory order (B, S, H, D): that of a projection's output.

    Fused kernels return their output in the order of the query. The next matmul takes it by token.
    """
    return heads.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).transpose(1, 2)


def widen_mask(mask: Tensor, key_length: int) -> Tensor:
    """An additive fp32 mask of exactly `key_length` columns.

    mask (B or 1, heads or 1, Q, at least K): boolean, True where attention is allowed, or additive in any float dtype.
    Masked means the dtype's minimum (or -inf). float16's minimum, -65504, hides nothing among scores of 1e5, so it
    becomes fp32's. It does not become -inf, which makes a row with every key masked NaN. 4.42 to 4.52 pass one column
    too many.
    """
    mask = mask[..., :key_length]
    lowest = torch.finfo(torch.float32).min
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, lowest)
    return torch.nn.functional.threshold(mask.float(), torch.finfo(mask.dtype).min, lowest)


def mask_to_minus_inf(mask: Tensor, key_length: int) -> Tensor:
    """An additive mask of exactly `key_length` columns with -inf for its minimum; a boolean mask as it is.

    It is for fused kernels, which take a mask in float16 only. Rows with every key masked keep the minimum: a softmax
    over -inf alone is NaN.
    """
    mask = mask[..., :key_length]
    if mask.dtype == torch.bool:
        return mask
    masked = mask <= torch.finfo(mask.dtype).min
    return mask.masked_fill(masked & ~masked.all(-1, keepdim=True), -torch.inf)


def prepare_each_time(prepare: Callable[[Tensor, int], Tensor], mask: Tensor, key_length: int) -> Tensor:
    """Default for `prepared` below: calls `prepare` every time and keeps nothing."""
    return prepare(mask, key_length)


def sdpa_takes_fp32(value: Tensor) -> bool:
    """Whether torch's fused attention gets fp32: on a CPU, where its kernel takes several times as long in float16."""
    return runs_on_cpu(value) and not autocast.autocast_is_on("cpu")


def flex_pads(heads: Tensor) -> bool:
    """Whether flex_attention pads head_dim to a power of two, so that a few more channels double its work: on a GPU."""
    return not runs_on_cpu(heads)


def sdpa_operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    prepared: Callable[[Callable[[Tensor, int], Tensor], Tensor, int], Tensor] = prepare_each_time,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The operands of torch's fused attention, from a query in fp32, key, value and any mask (see `widen_mask`).

    prepared: calls one of the two functions above, or returns what it has kept from another layer.
    They are fp32 where `sdpa_takes_fp32`, elsewhere of the dtype of `value`.
    """
    if not sdpa_takes_fp32(value):
        mask = None if mask is None else prepared(mask_to_minus_inf, mask, key.shape[-2])
        return laid_out_by_token(query, value.dtype), key, value, mask
    if mask is not None and mask.dtype != torch.bool:
        mask = prepared(widen_mask, mask, key.shape[-2])
    return query.float(), key.float(), value.float(), mask


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Softmax attention with fp32 scores; query heads that share a key head (Ainslie et al. 2023) share its matmul.

    query (B, H, Q, D), key and value (B, G, K, D); mask as `widen_mask` returns it, or None to mask nothing.
    Returns the output (B, H, Q, D), not yet rounded on a CPU, and the weights (B, H, Q, K) in the dtype of `value`.
    Product, scale, mask and softmax are fp32, with autocast too. The weights are rounded for the product with `value`.
    On a CPU they are not: there a float16 product takes 8 to 40 times as long as one in fp32. Everywhere a backward
    through the output reaches the weights that are returned.
    """
    device = autocast.autocast_device(query.device.type)
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return grouped_attention(query, key, value, mask, scaling, dropout)
    batch, heads, queries, head_dim = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    grouped = (batch * key_heads, heads // key_heads * queries)
    rows, columns = query.float().reshape(*grouped, head_dim), key.float().flatten(0, 1).transpose(1, 2)
    nothing = rows[:1, :1, :1].detach()  # times beta, 0: baddbmm is here for its alpha, which scales the product
    if device_of(rows) not in IN_PLACE:
        nothing = torch.zeros_like(nothing)  # MPS does multiply it: a query of NaN would reach every row
    # The scan takes the first baddbmm after an attention starts, or the first product of 4 dimensions, for the scores.
    # So this is a baddbmm, and none goes before it: tests/scanning/test_findings.py,
    # test_the_scores_of_a_fixed_model_are_its_own.
    scores = torch.baddbmm(nothing, rows, columns, beta=0, alpha=scaling).view(batch, heads, queries, keys)
    if mask is not None:
        scores = add_mask(scores, mask)
    exact = softmax(scores)
    if dropout > 0.0:
        exact = torch.nn.functional.dropout(exact, dropout)
    weights = exact.to(value.dtype)
    if runs_on_cpu(value):
        exact = backward_through(weights, exact)
        output = exact.view(*grouped, keys) @ value.float().flatten(0, 1)
    else:
        output = weights.view(*grouped, keys) @ value.flatten(0, 1)
    return output.view(batch, heads, queries, head_dim), weights


def add_mask(scores: Tensor, mask: Tensor) -> Tensor:
    """scores + mask, in the memory of the scores; not under torch.func, where the mask may be the larger of the two."""
    if torch.compiler.is_compiling() or is_transformed():
        return scores + mask
    return scores.add_(mask)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, in the memory of the scores unless autograd or a compiler keeps them.

    On devices that IN_PLACE does not name it takes new memory: no kernel there is known to write over its input.
    """
    kept = scores.requires_grad or torch.compiler.is_compiling() or is_transformed()
    if kept or device_of(scores) not in IN_PLACE:
        return torch.softmax(scores, dim=-1)
    return torch.softmax(scores, dim=-1, out=scores)


def scaled_product(zero: Tensor, gate: Tensor, up: Tensor, exponent: int, memory: Tensor | None = None) -> Tensor:
    """2^-exponent · gate · up, (B, S, intermediate) in float16, rounded once: the product itself is never stored.

    zero: a float16 zero without dimensions. On devices that ONE_KERNEL names, addcmul multiplies in fp32, the factor
    included, in one kernel. The fp32 product of two float16 numbers is exact, so every device returns the same bits.
    memory: where to put the product, if given; it may be `gate`.
    """
    if device_of(gate) not in ONE_KERNEL:
        return (gate.float() * up.float() * 2.0**-exponent).to(zero.dtype)
    return torch.addcmul(zero, gate, up, value=2.0**-exponent, out=memory)


def scaled_down(activation: Tensor, exponent: int) -> Tensor:
    """2^-exponent · activation in float16, rounded once: nothing but what falls below float16's smallest normal number.

    activation: float16, in one kernel, or fp32.
    """
    return (activation * 2.0**-exponent).to(torch.float16)


def token_exponent(activation: Tensor, bits: int = 0) -> Tensor:
    """The least e >= 0 with |x| <= 2^(e + bits) in all channels x of a token.

    activation (B, S, channels) in fp32; returns integers (B, S, 1).
    """
    largest = activation.detach().abs().amax(-1, keepdim=True)
    # Without frexp it comes from the bits of an fp32 number, 2^(e - 127)·1.…, which torch.jit.trace cannot follow.
    by_frexp = device_of(largest) in FREXP
    exponent = torch.frexp(largest).exponent if by_frexp else (largest.view(torch.int32) >> 23) - 126
    exponent = exponent.clamp(min=bits)
    return exponent - bits if bits else exponent
