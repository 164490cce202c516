"""Records the arithmetic that the numerics version stands for, in tests/numerics.json; a test compares.

It records digests of outputs. Their inputs make every intermediate exactly representable, so no order of summation and
no CPU makes a difference: if a digest changes, the arithmetic has changed.

    python tools/golden_outputs.py    records anew; refuses if outputs have changed under the same numerics version
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "numerics.json"

sys.path.insert(0, str(ROOT))
from qwen2_fp16_fix.patches import linears as projections  # noqa: E402
from qwen2_fp16_fix.patches import numerics, range_bounds, range_plan, scaling, two_part_keys  # noqa: E402
from qwen2_fp16_fix.patches.version_map import NUMERICS  # noqa: E402

HALF = torch.float16
WHAT_TO_DO = (
    "If the arithmetic has changed, raise NUMERICS in patches/version_map.py and the major version (before 1.0 the "
    "minor one), and say so in CHANGELOG.md; if it has not, or once you have, record it with "
    "`python tools/golden_outputs.py`."
)


def output_digest(output: Tensor) -> str:
    """SHA-256 of the dtype, the shape and the bits of a tensor."""
    bits = bytes(output.contiguous().view(torch.uint8).flatten().tolist())
    return hashlib.sha256(f"{output.dtype} {tuple(output.shape)} ".encode() + bits).hexdigest()


def steps(*shape: int, stride: int, modulus: int, dtype: torch.dtype = HALF) -> Tensor:
    """Whole numbers around 0, of which a sum of some products is exact in fp32 and, small enough, in float16."""
    numbers = torch.arange(torch.Size(shape).numel()) * stride % modulus - modulus // 2
    return numbers.view(shape).to(dtype)


def outputs(backwards: bool = False) -> dict[str, Tensor]:
    """What the arithmetic gives, by name. backwards: with the terms of every sum in the opposite order."""
    return {
        name: output
        for case in (norm, rotation, two_parts, masks, attention, product, linears, plan)
        for name, output in case(backwards)
    }


def norm(backwards: bool) -> Iterator[tuple[str, Tensor]]:
    """The squares add up to 2778², and their mean plus eps is 2^22. 2049/2048, rounded before the gain, would be 1."""
    hidden = torch.tensor([2049.0, 1501.0, 241.0, 1099.0])
    gain = torch.tensor([1 + 3 * 2**-10, 3 - 2**-9, 1.5, 1 + 2**-10], dtype=HALF)
    order = [3, 2, 1, 0] if backwards else [0, 1, 2, 3]
    yield "rms_norm", numerics.rms_norm(hidden[order], gain[order], 2264983.0, HALF)[order]
    halves = torch.tensor([60000.0, 1.0, 2.0**-14], dtype=HALF)
    yield "promote_residual", numerics.promote_residual(halves) + halves


def rotation(backwards: bool) -> Iterator[tuple[str, Tensor]]:
    """Angles whose sine and cosine are eighths; keys of 12 bits and more, once they are turned and shifted."""
    states = steps(1, 2, 5, 8, stride=37, modulus=2001)
    cos, sin = (steps(1, 5, 8, stride=stride, modulus=17, dtype=torch.float32) / 8 for stride in (5, 3))
    shift = steps(1, 2, 1, 8, stride=7, modulus=33, dtype=torch.float32) / 16
    yield "rotate", numerics.rotate(states, cos, sin)
    yield "rotate and shift", numerics.rotate(states, cos, sin, shift)
    yield "rotate and shift, rounded", numerics.rotate(states, cos, sin, shift).to(HALF)


def two_parts(backwards: bool) -> Iterator[tuple[str, Tensor]]:
    """Keys and queries of 20 bits, whose rounding to 11 bits is never a tie; and which pairs are split."""
    exact = steps(1, 4, 5, 8, stride=37007, modulus=1000003, dtype=torch.float32) / 4 + 2.0**-5
    bias, rest = steps(4, 8, stride=5, modulus=23).double(), torch.tensor([0.0, 0.01, 0.5, 2.0], dtype=torch.float64)
    split = two_part_keys.choose_pairs(bias[:2], bias, rest)
    assert split is not None
    yield "choose_pairs", split.channels
    yield "widened_keys", two_part_keys.widened_keys(exact[:, :2], split.channels[:, 4:], HALF)
    for name, dtype in (("rounded", HALF), ("not rounded", None)):
        yield f"widened_queries, {name}", two_part_keys.widened_queries(exact, split.channels[:, :4], dtype)


def masks(backwards: bool) -> Iterator[tuple[str, Tensor]]:
    """Boolean and additive, with a row that has everything masked and a column too many."""
    allowed = torch.ones(1, 1, 4, 6, dtype=torch.bool).tril(1)
    allowed[..., 2, :] = False
    lowest = torch.finfo(HALF).min
    additive = torch.zeros(1, 1, 4, 6, dtype=HALF).masked_fill(~allowed, lowest)
    yield "widen_mask, boolean", numerics.widen_mask(allowed, 5)
    yield "widen_mask, additive", numerics.widen_mask(additive, 5)
    yield "seal_mask", numerics.mask_to_minus_inf(additive, 6)


def attention(backwards: bool) -> Iterator[tuple[str, Tensor]]:
    """Scores beyond 65504 that are equal or so far apart that a softmax gives 1/2, 1/4 and 0, and nothing else."""
    query = steps(1, 4, 3, 8, stride=1, modulus=8) + 64 * steps(1, 4, 3, 1, stride=1, modulus=2).mul(2).add(1)
    key = torch.tensor([128.0, 64.0], dtype=HALF).repeat(4)[None, None, :, None].expand(1, 2, 8, 8)
    value = steps(1, 2, 8, 8, stride=12, modulus=1004)
    allowed = torch.ones(1, 1, 3, 8, dtype=torch.bool)
    allowed[..., [0, 4]] = False  # leaves two keys of one sort and four of the other
    mask = torch.zeros(1, 1, 3, 8, dtype=HALF).masked_fill(~allowed, torch.finfo(HALF).min)
    if backwards:
        query, key, value, mask = query.flip(-1), key.flip(-1, -2), value.flip(-2), mask.flip(-1)
    output, weights = numerics.grouped_attention(query, key, value, numerics.widen_mask(mask, 8), 0.25)
    yield "grouped_attention, output", output
    yield "grouped_attention, weights", weights.flip(-1) if backwards else weights


def product(backwards: bool) -> Iterator[tuple[str, Tensor]]:
    """Products of 22 bits, some past 65504 before they are scaled, rounded once; and exponents by token."""
    gate, up = steps(1, 6, 8, stride=173, modulus=2047), steps(1, 6, 8, stride=311, modulus=2045)
    yield "scaled_product", numerics.scaled_product(torch.zeros((), dtype=HALF), gate, up, 5)
    yield "token_exponent", numerics.token_exponent(gate.float() * up.float())


def linears(backwards: bool) -> Iterator[tuple[str, Tensor]]:
    """Small whole weights, so that every part of a sum is exact in float16; what follows the matmul is not small."""
    hidden = steps(1, 4, 8, stride=3, modulus=15)
    weight = steps(6, 8, stride=5, modulus=7)
    if backwards:
        hidden, weight = hidden.flip(-1), weight.flip(-1)
    plain, small, spiked = nn.Linear(8, 6, bias=False), nn.Linear(8, 6), nn.Linear(8, 6)
    for linear in (plain, small, spiked):
        linear.weight = nn.Parameter(weight)
    small.bias = nn.Parameter(torch.tensor([3.25, -1.5, 0.0, 7.0, 5.5, -3.0], dtype=HALF))
    spiked.bias = nn.Parameter(torch.tensor([300.25, -160.125, 0.0, 7.0, 1000.5, -3.0], dtype=HALF))
    with torch.no_grad():
        yield "exact bias", projections.project_exactly(spiked, hidden / 64)
        yield "exact bias, scaled input", projections.project_exactly(spiked, hidden * 256.0, 6)
        yield "scaled_linear", scaling.scaled_linear(plain, hidden, torch.full((1,), 2.0**14))
        yield "linear_by_token", scaling.linear_by_token(plain, hidden.float() * 2.0**20, 8)
        yield "linear_by_token, bias", scaling.linear_by_token(small, hidden.float() * 2.0**4, 8)


def plan(backwards: bool) -> Iterator[tuple[str, Tensor]]:
    """Exponents, which are whole numbers, of layers whose bounds lie far from where an exponent ends."""
    shape = range_bounds.LayerShape(hidden=16, heads=4, kv_heads=2, head_dim=4, positions=64)
    sizes = {"self_attn.q": (16, 16), "self_attn.k": (8, 16), "self_attn.v": (8, 16), "self_attn.o": (16, 16)}
    sizes |= {"mlp.gate": (32, 16), "mlp.up": (32, 16), "mlp.down": (16, 32)}
    found = []
    for scale in (1.0, 24.0, 96.0):
        weights = {f"{name}_proj.weight": torch.full(size, scale, dtype=HALF) for name, size in sizes.items()}
        weights |= {f"{name}_layernorm.weight": torch.ones(16, dtype=HALF) for name in ("input", "post_attention")}
        found.append(list(range_plan.plan_layer(weights, shape).exponents))
    yield "plan_layer", torch.tensor(found)


def current() -> dict[str, Any]:
    """The record of the arithmetic as it is now."""
    return {
        "numerics": NUMERICS,
        "outputs": {name: output_digest(output) for name, output in outputs().items()},
    }


def changes(recorded: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What differs, a phrase each."""
    before, now = recorded["outputs"], found["outputs"]
    return [
        f"the output of {name} has changed" for name in sorted({*before, *now}) if before.get(name) != now.get(name)
    ]


def main() -> int:
    """0 with the record written, 1 where it would hide a change of the arithmetic."""
    found = current()
    if RECORD.exists():
        recorded = json.loads(RECORD.read_text(encoding="utf-8"))
        lost = [name for name, digest in recorded["outputs"].items() if found["outputs"].get(name) != digest]
        if lost and found["numerics"] <= recorded["numerics"]:
            print(f"not recorded: the output of {', '.join(lost)} has changed under numerics {NUMERICS}. {WHAT_TO_DO}")
            return 1
        print("\n".join(changes(recorded, found)) or "nothing has changed")
    RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
