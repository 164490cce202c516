"""What may not change a fixed model's answer: later tokens, pads, and torch's switches."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests import stress

from .accuracy import CLOSE, FUSED
from .proof import NotAvailable, Proof, attempt
from .subjects import SHAPE, named, oracle_of, pair, stressed
from .ways import kl, logits

TOKENS, PADS = 64, 5
FAR = 4000  # a first position where the angles of the slow pairs are no longer small
SWITCHED_TOKENS = 128


def causality(proof: Proof) -> None:
    """A later token changes no earlier logit, and what a pad says changes nothing: bit for bit.

    Where a kernel leaks with stock's code as well, on weights without a spike, it is no promise of the fix.
    """
    stock = pair(stressed(()), torch.float16, proof.device)[0]
    fixed = pair(stressed(stress.KINDS), torch.float16, proof.device)[1]
    for way in FUSED:
        if not proof.over(f"causality, {way}"):
            with proof.row("causality", way=way) as row:
                row |= unchanged(fixed, way)
                of_stock, _ = attempt(functools.partial(unchanged, stock, way))
                row["stock"] = of_stock
                for what, kept in unchanged_promises(row):
                    is_stocks = of_stock is not None and not of_stock[what]
                    proof.promise(row[what] or is_stocks, f"With {way}, {kept}")


def unchanged_promises(row: dict[str, Any]) -> list[tuple[str, str]]:
    """What each entry of the row says if it is false."""
    return [
        ("future", "a later token changes an earlier logit."),
        ("pads", "what a pad says changes a token's logits."),
        ("finite", "a left-padded prompt is not finite at its tokens."),
    ]


def unchanged(model: Any, way: str) -> dict[str, bool]:
    """Whether later tokens and pads change nothing, and whether a padded prompt is finite.

    A kernel that takes no mask is asked about later tokens alone.
    """
    ids, other = (stress.random_prompt(SHAPE, 2, TOKENS, seed=seed) for seed in (0, 1))
    half = TOKENS // 2
    changed = torch.cat((ids[:, :half], other[:, half:]), 1)
    before, after = (logits(model, way, each)[:, :half] for each in (ids, changed))
    found = {"future": torch.equal(before, after), "pads": True, "finite": True}
    mask = torch.ones_like(ids)
    mask[0, :PADS] = 0
    padded = ids.clone()
    padded[0, :PADS] = 9
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    try:
        both = [logits(model, way, each, **inputs) for each in (ids, padded)]
    except NotAvailable:
        return found | {"masks": False}
    one, two = (torch.cat((each[0, PADS:], each[1])) for each in both)
    return found | {"pads": torch.equal(one, two), "finite": bool(one.isfinite().all()), "masks": True}


def switches(proof: Proof) -> None:
    """KL to fp32 with each of torch's switches, near the start of a context and far from it. Finite is promised."""
    ids = stress.random_prompt(SHAPE, 2, SWITCHED_TOKENS)
    for kinds in ((), ("scores",), stress.KINDS):
        base = stressed(kinds, max_position_embeddings=32768)
        fixed = pair(base, torch.float16, proof.device)[1]
        for start in (0, FAR):
            positions = torch.arange(start, start + ids.shape[1]).expand(2, -1)
            oracle = oracle_of(base, ids, position_ids=positions)
            for switch, way in ((switch, way) for switch in SWITCHES for way in ("eager", "sdpa")):
                if not proof.over(f"switch {switch}, {named(kinds)} from {start:,}, {way}"):
                    with proof.row("switches", switch=switch, weights=named(kinds), start=start, way=way) as row:
                        row |= switched(proof, row, fixed, oracle, ids, positions)


def switched(
    proof: Proof, row: dict[str, Any], model: Any, oracle: Tensor, ids: Tensor, positions: Tensor
) -> dict[str, Any]:
    """KL with the row's switch on."""
    with SWITCHES[row["switch"]]():
        found = logits(model, row["way"], ids, position_ids=positions)
    name = f"{row['weights']} from position {row['start']:,} with {row['way']} and the switch {row['switch']}"
    value = kl(oracle, found)
    proof.promise(value is not None, f"A fixed model of {name} is not finite.")
    is_close = row["switch"] != "default" or value is None or value < CLOSE
    proof.promise(is_close, f"A fixed model of {name} has KL {value or 0:.1e}, not {CLOSE:.0e}.")
    return {"kl": value}


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """`torch.set_float32_matmul_precision`, meanwhile."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def matmul_switch(name: str, value: bool) -> Iterator[None]:
    """A switch of `torch.backends.cuda.matmul`, meanwhile."""
    owner = torch.backends.cuda.matmul
    try:
        before = getattr(owner, name)
    except (AttributeError, AssertionError) as error:
        raise NotAvailable(f"this torch has no switch {name}") from error
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


#: By name. The last one is on by default.
SWITCHES: dict[str, Callable[[], Any]] = {
    "default": contextlib.nullcontext,
    "allow_tf32": lambda: matmul_switch("allow_tf32", True),
    'precision "high"': lambda: precision("high"),
    'precision "medium"': lambda: precision("medium"),
    "allow_fp16_accumulation": lambda: matmul_switch("allow_fp16_accumulation", True),
    "no reduced-precision reduction": lambda: matmul_switch("allow_fp16_reduced_precision_reduction", False),
}
