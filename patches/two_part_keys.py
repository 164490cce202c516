"""Keys in two float16 numbers, in the rotary pairs that a constant centre cannot follow.

The centre (key_centring.py) takes the bias out of a key only where the pair hardly turns. What it leaves in a pair that
turns, b·(e^(iωp) - m), is as long as a spike and is rounded together with what the token adds. Such a pair is split:
its two channels are stored as hi = float16(k) and, behind the D channels of the head, as hi again and
lo = float16(k - hi). The query carries them again:

    key    [hi of all D | hi of the split | lo of the split]
    query  [q  of all D | q - float16(q)  | q              ]

So a kernel that rounds the query computes float16(q)·hi + (q - float16(q))·hi + float16(q)·lo, which is q·k up to
2^-22. A kernel that does not gets 0 in the middle. The values are padded with zeros to the width of the keys, since
fused kernels want both alike, and the output is cut. The first D channels alone are a centred key.

A pair is split where |b_k|·rest·max(LEAST_QUERY, |b_q|) > THRESHOLD, with rest the largest |e^(iωp) - m| in the context
that the configuration declares, and |b_q| the longest query bias of the heads that read the key. Rounding such a key
once would move scores by about THRESHOLD·2^-12. The choice depends on weights alone, so all caches of a model agree.
"""

from typing import NamedTuple

import torch
from torch import Tensor

THRESHOLD = 64.0
LEAST_QUERY = 4.0  # length in a pair of what tokens add to a query: a query without a bias reads keys as well
MOST_PAIRS = 16  # of a head: 4 channels each

#: Of an fp32 number, the low bits that a 16-bit number does not have.
DROPPED_BITS = {torch.float16: 13, torch.bfloat16: 16}


class Split(NamedTuple):
    """The split pairs of an attention layer: as many in each head."""

    channels: Tensor  # (1, H + G, 1, 2n), integers: of each query head, then of each key head
    extra: int  # channels behind the D of a head, 4n; a field, since torch's compiler before 2.8 takes no property
    left: int  # pairs of one head, at most, that ask to be split and are not


def choose_pairs(key_bias: Tensor, query_bias: Tensor, rest: Tensor) -> Split | None:
    """The pairs to split. None if no pair asks for it.

    key_bias (G, D) and query_bias (H, D), times what yarn multiplies rotations by; rest (D/2,): the largest
    |e^(iωp) - m| of each pair. All in fp64 on the CPU.
    """
    groups = len(key_bias)
    lengths = (torch.hypot(*each.chunk(2, -1)) for each in (key_bias, query_bias))
    keys, queries = next(lengths), next(lengths)
    queries = queries.view(groups, -1, queries.shape[-1]).amax(1)
    weight = keys * rest * queries.clamp(min=LEAST_QUERY)
    asked = int((weight > THRESHOLD).sum(-1).max())
    if asked == 0:
        return None
    count = min(asked + asked % 2, MOST_PAIRS, weight.shape[-1])  # fused kernels want multiples of 8 channels
    pairs = weight.topk(count).indices.sort().values
    channels = torch.cat((pairs, pairs + weight.shape[-1]), -1)
    by_head = torch.cat((channels.repeat_interleave(len(query_bias) // groups, 0), channels))
    return Split(by_head.view(1, len(by_head), 1, -1), 4 * count, max(0, asked - count))


def pick(heads: Tensor, channels: Tensor) -> Tensor:
    """The split channels of heads (B, heads, S, D), (B, heads, S, 2n). channels: (1, heads, 1, 2n)."""
    return heads.gather(-1, channels.expand(heads.shape[0], -1, heads.shape[2], -1))


def upper(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """`exact`, in fp32, rounded to the precision of `dtype` and still in fp32.

    A compiler takes `exact.to(dtype).float()` for `exact` and would lose every lower part. So compiled code rounds the
    bits, to the nearest and from the middle to even, as `to` does. Gradients pass as if nothing were rounded.
    """
    if not torch.compiler.is_compiling() or dtype not in DROPPED_BITS:
        return exact.to(dtype).float()
    dropped = DROPPED_BITS[dtype]
    bits = exact.detach().view(torch.int32)
    odd = (bits >> dropped) & 1
    rounded: Tensor = ((bits + (2 ** (dropped - 1) - 1) + odd) & -(2**dropped)).view(torch.float32)
    return exact + (rounded - exact.detach()) if exact.requires_grad else rounded


def widened_keys(keys: Tensor, channels: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys (B, G, S, D) in fp32 as they are stored, (B, G, S, D + 4n) in `dtype`. channels: of the key heads."""
    split = pick(keys, channels)
    high = upper(split, dtype)
    return torch.cat((keys.to(dtype), high.to(dtype), (split - high).to(dtype)), -1)


def widened_queries(queries: Tensor, channels: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Queries (B, H, S, D) in fp32 as they meet such keys, (B, H, S, D + 4n) in fp32. channels: of the query heads.

    dtype: what a fused kernel rounds them to; None if they are not rounded.
    """
    split = pick(queries, channels)
    lost = torch.zeros_like(split) if dtype is None else split - upper(split, dtype)
    return torch.cat((queries, lost, split), -1)
