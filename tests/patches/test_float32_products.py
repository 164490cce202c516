"""What hardware that rounds the operands of fp32 matmuls costs a fixed model, in eager attention: played on a CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2_fp16_fix.patches import numerics
from tests.helpers import kl_to
from tests.patches.models import fixed, logits
from tests.stress import KINDS, TINY, build, random_prompt

PROMPT = random_prompt(TINY, batch=2, length=160)
aten = torch.ops.aten
MATMULS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}


def tf32(operand: Tensor, half_a_step: int = 0) -> Tensor:
    """With 10 bits of mantissa behind the first: truncated, or rounded where 4096 is added."""
    return ((operand.contiguous().view(torch.int32) + half_a_step) & -8192).view(torch.float32)


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "truncated": tf32,
    "rounded": lambda operand: tf32(operand, 4096),
    "bfloat16": lambda operand: operand.bfloat16().float(),
}


class Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounds both operands of every fp32 matmul, and counts them."""

    def __init__(self, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rounded, self.count = ROUNDINGS[name], 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in MATMULS and args[-1].dtype == torch.float32:
            self.count += 1
            args = (*args[:-2], *map(self.rounded, args[-2:]))
        return function(*args, **(kwargs or {}))


def error(kinds: tuple[str, ...], attention: str = "eager", rounding: str | None = None) -> float:
    """KL to fp32 of the fixed model in float16."""
    oracle, model = logits(build(TINY, kinds), PROMPT), fixed(*kinds, attention=attention)
    if rounding is None:
        return kl_to(oracle, logits(model, PROMPT))
    with Rounding(rounding) as mode:
        found = logits(model, PROMPT)
    assert mode.count >= TINY.layers  # the scores at least
    assert torch.isfinite(found).all()
    return kl_to(oracle, found)


@pytest.fixture(params=["cpu", "elsewhere"])
def device_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the weights' product with the values is fp32 as well, elsewhere the scores alone are."""
    monkeypatch.setattr(numerics, "runs_on_cpu", lambda tensor: request.param == "cpu")


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize("rounding", ["truncated", "rounded"])
@pytest.mark.parametrize("kinds", [(), ("scores",), ("keys",), KINDS], ids=["ordinary", "scores", "keys", "all"])
def test_tf32_costs_a_fixed_model_nothing_that_sdpa_does_not(kinds: tuple[str, ...], rounding: str) -> None:
    """A float16 key has 11 bits, as TF32 has. Truncation errs by up to a step where sdpa's rounding errs by half."""
    assert error(kinds, rounding=rounding) < 2 * error(kinds, "sdpa")


@pytest.mark.usefixtures("device_kind")
def test_bfloat16_operands_cost_what_a_float16_key_was_for() -> None:
    """So `doctor` says that "medium" matters. It is why TF32 may be waved through: this test would see such a loss."""
    assert error(("keys_fast",), rounding="bfloat16") > 20 * error(("keys_fast",), "sdpa")
