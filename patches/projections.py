"""From the input of an attention to its query, key and value: project, add biases in fp32, rotate, round once."""

from typing import Any

import torch
from torch import Tensor, nn

from . import attention_form
from .linears import LINEAR_FORWARD, is_separable, project_exactly
from .numerics import may_reuse_memory, rotate, scaled_down
from .two_part_keys import widened_keys


def rotated_projections(
    attention: Any, hidden_states: Tensor, cos: Tensor, sin: Tensor, form: attention_form.Form
) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, H, S, D) in fp32, key and value (B, G, S, D, or wider) in the dtype of the matmuls.

    hidden_states (B, S, hidden). Query and key are rotated in fp32; keys get the shift and are rounded once, in split
    pairs to two numbers. Values are then padded with zeros to the width of the keys.
    """
    scaled = scaled_down(hidden_states, form.input) if form.input else hidden_states
    turned = rotate(queries_and_keys(attention, hidden_states, scaled, form.input), cos, sin, form.shift)
    if form.rotated:
        turned = turned * 2.0**-form.rotated
    value = values(attention, hidden_states, scaled, form)
    query, key = turned.split_with_sizes((turned.shape[1] - value.shape[1], value.shape[1]), dim=1)
    if form.split is None:
        return query, key.to(value.dtype), value
    channels = form.split.channels[:, -value.shape[1] :]
    return query, widened_keys(key, channels, value.dtype), nn.functional.pad(value, (0, form.split.extra))


def values(attention: Any, hidden_states: Tensor, scaled: Tensor, form: attention_form.Form) -> Tensor:
    """The values (B, G, S, D), times 2^-form.values, in the dtype of the matmuls.

    scaled: hidden_states times 2^-form.input.
    """
    v_proj, (batch, length, _) = attention.v_proj, scaled.shape
    if not form.input and not form.values:
        found: Tensor = v_proj(hidden_states)
    elif can_fuse_bias(v_proj) and is_separable(v_proj):  # in one kernel
        bias_factor, product_factor = 2.0**-form.values, 2.0 ** (form.input - form.values)
        rows, weight = scaled.flatten(0, 1), v_proj.weight.t()
        found = torch.addmm(v_proj.bias, rows, weight, beta=bias_factor, alpha=product_factor)
    else:
        exact = project_exactly(v_proj, hidden_states, form.input, scaled) * 2.0**-form.values
        found = exact.to(attention_form.matmul_dtype(attention, hidden_states))
    return found.view(batch, length, -1, attention.head_dim).transpose(1, 2)


def queries_and_keys(attention: Any, hidden_states: Tensor, scaled: Tensor, exponent: int) -> Tensor:
    """The heads of q_proj and then those of k_proj, (B, H + G, S, D), for one rotation; fp32 where biases are exact.

    scaled: hidden_states times 2^-exponent.
    """
    q_proj, k_proj, head_dim = attention.q_proj, attention.k_proj, attention.head_dim
    batch, length, _ = scaled.shape
    can_fuse = attention.factor is not None and exponent == attention.ranges.input
    if not (can_fuse and can_fuse_bias(q_proj) and can_fuse_bias(k_proj) and may_reuse_memory(q_proj, k_proj)):
        by_head = (batch, length, -1, head_dim)
        products = [project_exactly(each, hidden_states, exponent, scaled) for each in (q_proj, k_proj)]
        return torch.cat([each.view(by_head).transpose(1, 2) for each in products], 1)
    sizes = [q_proj.out_features // head_dim, k_proj.out_features // head_dim]
    heads = torch.empty((batch, sum(sizes), length, head_dim), dtype=torch.float32, device=scaled.device)
    queries, keys = heads.split_with_sizes(sizes, 1)
    write_with_bias(q_proj, scaled, queries, attention.factor)
    write_with_bias(k_proj, scaled, keys, attention.factor)
    return heads


def can_fuse_bias(projection: Any) -> bool:
    """Whether a projection is a plain linear with a bias and a whole weight, not a rank's shard."""
    if type(projection) is not nn.Linear or nn.Linear.forward is not LINEAR_FORWARD:
        return False
    parameters = projection._parameters  # a replica, a flat shard and a pruned linear have no weight here
    return type(parameters.get("weight")) is nn.Parameter and parameters.get("bias") is not None


def write_with_bias(linear: nn.Linear, scaled: Tensor, heads: Tensor, factor: Tensor) -> None:
    """Writes linear(factor · scaled), with its bias added in fp32, into fp32 heads (B, H, S, D).

    factor: a power of two in fp32, (1,). The kernel multiplies the product by it, which makes it fp32 before the bias
    is added.
    """
    batch, _, length, head_dim = heads.shape
    product = nn.functional.linear(scaled, linear.weight).view(batch, length, -1, head_dim)
    torch.addcmul(linear.bias.view(-1, 1, head_dim), product.transpose(1, 2), factor, out=heads)
