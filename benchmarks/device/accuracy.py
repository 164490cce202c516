"""How far a fixed model is from stock's fp32 on a CPU, by kind of weights, dtype, attention and cache."""

import functools
from typing import Any

import torch
from torch import Tensor

from tests import stress

from ..models import DTYPES
from .proof import NotAvailable, Proof, attempt
from .subjects import SHAPE, named, oracle_of, pair, stressed
from .ways import WAYS, kl, logits, over_a_cache

#: KL to fp32 that the conformance suite allows: an ordinary fixed model is at 1e-6, a wrong mask or position at 1e-2.
CLOSE = 2e-5
#: On a GPU flex_attention pads heads to a power of two, so keys that turn are centred there and not in two parts.
CLOSE_CENTRED = 5e-4
#: bfloat16 has 3 bits of mantissa less than float16, and rounding errors enter the KL squared.
CLOSE_BF16 = 64 * CLOSE
FUSED = [way for way in WAYS if way != "flex"]


def accuracy(proof: Proof) -> None:
    """Every kind, in every way: a whole prompt, and one whose last tokens are read over a cache."""
    ids = stress.random_prompt(SHAPE, 2, proof.sizes.tokens)
    for dtype in ("fp16", "bf16"):
        for kinds in proof.sizes.kinds:
            if proof.over(f"accuracy of {named(kinds)} in {dtype}"):
                continue
            oracle = oracle_of(stressed(kinds), ids)
            models = pair(stressed(kinds), DTYPES[dtype], proof.device)
            for way in FUSED:
                if not proof.over(f"accuracy of {named(kinds)} in {dtype}, {way}"):
                    with proof.row("accuracy", weights=named(kinds), dtype=dtype, way=way) as row:
                        compare(proof, row, models, oracle, ids)


def flex(proof: Proof) -> None:
    """flex_attention, for a few kinds, and for one token over a cache, since each shape is compiled for seconds."""
    ids = stress.random_prompt(SHAPE, 2, proof.sizes.tokens)
    for kinds in proof.sizes.flex_kinds:
        if not proof.over(f"accuracy of {named(kinds)}, flex"):
            models = pair(stressed(kinds), torch.float16, proof.device)
            with proof.row("accuracy", weights=named(kinds), dtype="fp16", way="flex") as row:
                compare(proof, row, models, oracle_of(stressed(kinds), ids), ids, last=1)


def two_parts(proof: Proof) -> None:
    """Keys in two float16 numbers: spikes in pairs that turn fast, at the base of Qwen2.5-Math, over a long prompt."""
    settings = {"rope_theta": 1e4, "max_position_embeddings": proof.sizes.long_tokens}
    base = stressed(("keys_fast",), **settings)
    ids = stress.random_prompt(SHAPE, 1, proof.sizes.long_tokens)
    oracle, models = oracle_of(base, ids), pair(base, torch.float16, proof.device)
    for way in FUSED:
        if proof.over(f"keys in two parts, {way}"):
            continue
        case = {"weights": "keys_fast at base 1e4", "dtype": "fp16", "way": way, "tokens": ids.shape[1]}
        with proof.row("two parts", **case) as row:
            cache = compare(proof, row, models, oracle, ids)
            row["stored"], row["head_dim"] = cache.layers[0].keys.shape[-1], SHAPE.head_dim
            proof.promise(row["stored"] > SHAPE.head_dim, f"Keys that ask for two parts are stored in one with {way}.")


def compare(
    proof: Proof, row: dict[str, Any], models: tuple[Any, Any], oracle: Tensor, ids: Tensor, last: int = 8
) -> Any:
    """Puts into the row what stock and fixed are off by, and holds the promises. Returns the fixed model's cache."""
    (stock, fixed), way = models, row["way"]
    before, _ = attempt(functools.partial(logits, stock, way, ids))
    if before is not None:
        row |= {"stock_kl": kl(oracle, before), "stock_finite": bool(before.isfinite().all())}
    name = f"{row['weights']} in {row['dtype']} with {way}"
    refusal = f"The kernel of {way} takes what stock asks of it and not what the fix asks, {{}}."
    try:
        found = logits(fixed, way, ids)
    except NotAvailable:
        proof.promise(before is None, refusal.format("for a prompt"))
        raise
    row |= {"fixed_kl": kl(oracle, found), "fixed_finite": bool(found.isfinite().all())}
    hold(proof, row, "fixed_kl", name)
    try:
        found, cache = over_a_cache(fixed, way, ids, last)
    except NotAvailable:
        stocks, _ = attempt(functools.partial(over_a_cache, stock, way, ids, last))
        proof.promise(stocks is None, refusal.format("over a cache"))
        raise
    row["cached_kl"] = kl(oracle, found)
    hold(proof, row, "cached_kl", f"{name}, over a cache,")
    return cache


def hold(proof: Proof, row: dict[str, Any], what: str, name: str) -> None:
    """A fixed model is finite and close: in bfloat16 to what stock is, where stock is further away."""
    limit = CLOSE_CENTRED if row["way"] == "flex" else CLOSE
    if row["dtype"] == "bf16":
        limit = max(CLOSE_BF16, 1.5 * (row.get("stock_kl") or 0.0))
    value = row[what]
    proof.promise(value is not None, f"A fixed model of {name} is not finite.")
    proof.promise(value is None or value < limit, f"A fixed model of {name} has KL {value or 0:.1e}, not {limit:.0e}.")
