"""Ways to compute eager attention's scores on a GPU: how exact each is, and how fast.

A fixed model multiplies query and key in fp32, which reads a fp32 copy of every key. From torch 2.8 on, torch.bmm takes
float16 operands on CUDA and returns fp32 (`out_dtype`). The query, which is fp32, is then rounded to float16, or split
into two float16 halves, hi and lo, whose products are added.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from qwen2_fp16_fix.patches import attention, numerics
from tests import stress

from ..pairs import seconds, warm_up
from .accuracy import CLOSE
from .graphs import captured
from .proof import NotAvailable, Proof, first_line, free_memory
from .subjects import SHAPE, named, oracle_of, pair, stressed
from .ways import kl, logits, over_a_cache

BADDBMM = torch.baddbmm
#: Query heads, key heads and head_dim of released models.
HEADS = {"0.5b": (14, 2, 64), "1.5b": (12, 2, 128), "7b": (28, 4, 128), "72b": (64, 8, 128)}
Way = Callable[[Tensor, Tensor, float], Tensor]


def fp32(rows: Tensor, columns: Tensor, scaling: float) -> Tensor:
    """Today's: rows (G, n, D) in fp32 times columns (G, D, K) in float16, which are widened."""
    return BADDBMM(rows[:1, :1, :1], rows, columns.float(), beta=0, alpha=scaling)


def tf32(rows: Tensor, columns: Tensor, scaling: float) -> Tensor:
    """As today's, with TF32, whose 10 bits hold a float16 key exactly and round the query."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return fp32(rows, columns, scaling)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def rounded(rows: Tensor, columns: Tensor, scaling: float) -> Tensor:
    """The query rounded to float16."""
    return product(rows.half(), columns).mul_(scaling)


def rounded_in_one(rows: Tensor, columns: Tensor, scaling: float) -> Tensor:
    """The query rounded to float16, and the scores scaled by the product itself, as today's are."""
    if rows.device.type != "cuda":
        return rounded(rows, columns, scaling)
    half = rows.half()
    with needs_out_dtype():
        return BADDBMM(half[:1, :1, :1], half, columns, out_dtype=torch.float32, beta=0, alpha=scaling)


def rounded_scaled(rows: Tensor, columns: Tensor, scaling: float) -> Tensor:
    """The query scaled and rounded in one kernel, so that the scores need no other one."""
    return product(torch.mul(rows, scaling, out=torch.empty_like(rows, dtype=torch.float16)), columns)


def halves(rows: Tensor, columns: Tensor, scaling: float) -> Tensor:
    """The query in two halves: two products, the second added to the first where torch can."""
    high = rows.half()
    low = (rows - high).half()
    return product(low, columns, product(high, columns)).mul_(scaling)


def stacked_halves(rows: Tensor, columns: Tensor, scaling: float) -> Tensor:
    """The two halves one below the other in one product, which reads the keys once."""
    high = rows.half()
    both = product(torch.cat((high, (rows - high).half()), 1), columns)
    top, bottom = both.chunk(2, 1)
    return top.add(bottom).mul_(scaling)


def product(rows: Tensor, columns: Tensor, added: Tensor | None = None) -> Tensor:
    """rows @ columns, both float16, in fp32, plus `added`. On a CPU by fp32 operands, which is the same but slow."""
    if rows.device.type != "cuda":
        exact = rows.float() @ columns.float()
        return exact if added is None else exact.add_(added)
    with needs_out_dtype():
        if added is None:
            return torch.bmm(rows, columns, out_dtype=torch.float32)
        return BADDBMM(added, rows, columns, out_dtype=torch.float32)


@contextmanager
def needs_out_dtype() -> Iterator[None]:
    """Raises NotAvailable where torch has it not: before 2.8, or on a card that it does not name."""
    try:
        yield
    except (TypeError, NotImplementedError) as error:
        raise NotAvailable(f"this torch has no out_dtype: {first_line(error)}") from error


WAYS: dict[str, Way] = {
    "fp32": fp32,
    "TF32": tf32,
    "query rounded": rounded,
    "query rounded, one kernel": rounded_in_one,
    "query scaled, rounded": rounded_scaled,
    "query in two halves": halves,
    "two halves, stacked": stacked_halves,
}
SCALING = 0.125  # of the scores, where nothing depends on it
ROUNDING = ("query rounded", "query rounded, one kernel", "query scaled, rounded")


@contextmanager
def scores_by(name: str) -> Iterator[None]:
    """Fixed eager attention with its scores computed in that way.

    The last step of the scores is the only torch.baddbmm of `grouped_attention`. A way that rounds the query is told
    so, since keys in two parts then carry what the rounding drops.
    """
    widened, way = attention.as_wide_as_keys, WAYS[name]

    def baddbmm(nothing: Tensor, rows: Tensor, columns: Tensor, *, beta: float, alpha: float) -> Tensor:
        return way(rows, columns.half(), alpha)  # columns: float16 keys, widened

    def as_rounded(query: Tensor, form: Any, dtype: torch.dtype | None) -> Tensor:
        return widened(query, form, torch.float16 if name in ROUNDING else dtype)

    with mock.patch.object(torch, "baddbmm", baddbmm), mock.patch.object(attention, "as_wide_as_keys", as_rounded):
        yield


def score_accuracy(proof: Proof) -> None:
    """KL of a fixed float16 model in eager attention, by the way its scores are computed; sdpa's beside it."""
    ids = stress.random_prompt(SHAPE, 2, proof.sizes.tokens)
    for kinds in proof.sizes.kinds:
        oracle, fixed = oracle_of(stressed(kinds), ids), pair(stressed(kinds), torch.float16, proof.device)[1]
        for name in WAYS:
            if proof.over(f"scores of {named(kinds)}, {name}"):
                continue
            with proof.row("score accuracy", weights=named(kinds), scores=name) as row:
                with scores_by(name):
                    found = logits(fixed, "eager", ids)
                    row["kl"] = kl(oracle, found)
                    row["cached_kl"] = kl(oracle, over_a_cache(fixed, "eager", ids)[0])
                row["close"] = row["kl"] is not None and row["kl"] < CLOSE
        with proof.row("score accuracy", weights=named(kinds), scores="sdpa") as row:
            row["kl"] = kl(oracle, logits(fixed, "sdpa", ids))


@dataclass(frozen=True)
class Operands:
    """Of one attention: the query in fp32, key and value in float16."""

    query: Tensor  # (1, H, Q, D)
    key: Tensor  # (1, G, K, D)
    value: Tensor

    @property
    def rows(self) -> Tensor:
        """The queries of a key head, one below the other, as `grouped_attention` takes them."""
        return self.query.reshape(self.key.shape[1], -1, self.query.shape[-1])

    @property
    def columns(self) -> Tensor:
        """The keys of a key head side by side."""
        return self.key.flatten(0, 1).transpose(1, 2)


def operands(width: str, queries: int, keys: int, device: torch.device) -> Operands:
    """Random ones at a released model's heads."""
    heads, groups, head_dim = HEADS[width]
    generator = torch.Generator(device).manual_seed(0)
    sizes = ((heads, queries), (groups, keys), (groups, keys))
    made = [torch.randn(1, *size, head_dim, generator=generator, device=device) for size in sizes]
    return Operands(made[0], made[1].half(), made[2].half())


def score_time(proof: Proof) -> None:
    """Seconds of the scores, and of the whole attention around them, as CUDA graphs; and how exact the scores are."""
    cases = [("decode", 1, context) for context in proof.sizes.contexts]
    cases += [("prompt", tokens, tokens) for tokens in proof.sizes.prompts]
    for width in proof.sizes.score_shapes:
        for phase, queries, keys in cases:
            if proof.over(f"time of scores {width} {phase} {keys:,}"):
                continue
            given = operands(width, queries, keys, proof.device)
            for name, way in WAYS.items():
                with proof.row("score time", width=width, phase=phase, tokens=keys, scores=name) as row:
                    row |= error_of(way, given)
                    row["scores_s"] = once(functools.partial(way, given.rows, given.columns, SCALING), proof)
                    row["attention_s"] = once(functools.partial(whole, name, given), proof)
            with proof.row("score time", width=width, phase=phase, tokens=keys, scores="stock") as row:
                row["attention_s"] = once(functools.partial(stock_eager, given), proof)


def whole(name: str, given: Operands) -> Tensor:
    """All of a fixed eager attention."""
    with scores_by(name):
        return numerics.grouped_attention(given.query, given.key, given.value, None, SCALING)[0]


def stock_eager(given: Operands) -> Tensor:
    """Eager attention as transformers writes it, in float16: keys repeated, softmax in fp32."""
    repeats = given.query.shape[1] // given.key.shape[1]
    key, value = (each.repeat_interleave(repeats, 1) for each in (given.key, given.value))
    scores = given.query.half() @ key.transpose(2, 3) * SCALING
    return torch.softmax(scores, -1, dtype=torch.float32).half() @ value


def error_of(way: Way, given: Operands) -> dict[str, Any]:
    """Of the scores, at most a few queries: the largest error over the largest score, in fp64."""
    rows = given.rows[:, :64].contiguous()
    exact = rows.double() @ given.columns.double() * SCALING
    return {"error": float((way(rows, given.columns, SCALING).double() - exact).abs().max() / exact.abs().max())}


@torch.no_grad()
def once(run: Callable[[], Any], proof: Proof) -> float:
    """Seconds of one run: the least of three measurements, of a CUDA graph where there is one."""
    if proof.device.type == "cuda":
        run = captured(run, proof.device)
    repeats = warm_up(run, proof.device)
    found = min(seconds(run, repeats, proof.device) for _ in range(3))
    del run  # and the memory of its graph
    free_memory(proof.device)
    return found
