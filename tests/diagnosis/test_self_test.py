"""The self-test passes if the fix works and fails on every half of it."""

from typing import Any

import pytest
import torch
from torch import nn

import qwen2_fp16_fix
from qwen2_fp16_fix.diagnosis import remarks, self_test
from qwen2_fp16_fix.patches import attention, blocks, key_centring, modeling_qwen2_fp16, planning
from qwen2_fp16_fix.patches.range_bounds import UNSCALED
from qwen2_fp16_fix.patches.range_plan import plan_layer


def test_the_self_test_passes() -> None:
    outcome = self_test.self_test("cpu")
    assert outcome.passed, outcome.remark
    assert [row.finite for row in outcome.rows] == [False, False, True, True]
    assert max(row.kl for row in outcome.rows[2:]) < self_test.KL_LIMIT / 5  # room for another device's order


def half_scores(query: Any, key: Any, value: Any, mask: Any, scaling: float, dropout: float = 0.0) -> Any:
    """Eager as stock has it: product and scale in float16."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = (query.to(value.dtype) @ key.transpose(2, 3)) * scaling
    weights = torch.softmax((scores if mask is None else scores + mask).float(), -1).to(value.dtype)
    return weights @ value, weights


BREAKS: dict[str, list[tuple[Any, str, Any]]] = {
    "the fix does nothing": [(modeling_qwen2_fp16, "exchange_all", lambda *args, **kwargs: None)],
    "the residual stays float16": [(blocks, "promote_residual", lambda hidden_states: hidden_states)],
    "keys are not centred": [(key_centring.CentredKeys, "centre_keys", lambda *args: None)],
    "no exponents": [
        (planning, "plan_layer", lambda *layer: plan_layer(*layer)._replace(exponents=UNSCALED)),
        (planning, "unproven_sites", lambda bounds, exponents: []),
    ],
    "scores as stock has them": [(attention, "grouped_attention", half_scores)],
}


@pytest.mark.parametrize("broken", BREAKS)
def test_the_self_test_fails_on_a_broken_fix(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A self-test that half a fix passes would tell people that all is well."""
    for owner, name, instead in BREAKS[broken]:
        monkeypatch.setattr(owner, name, instead)
    outcome = self_test.self_test("cpu")
    assert not outcome.passed
    assert outcome.remark.code == (
        "self_test.not_close" if broken == "keys are not centred" else "self_test.not_finite"
    )


def test_the_self_test_fails_where_stock_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardware that saturates instead of overflowing, or a model that is not broken, shows nothing about the fix."""
    monkeypatch.setattr(self_test, "_spike_keys", lambda model: None)
    monkeypatch.setattr(self_test, "_mark", lambda model: None)
    outcome = self_test.self_test("cpu")
    assert not outcome.passed
    assert outcome.remark.code == "self_test.not_reproduced"


def test_the_self_test_fails_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's errors run over five lines of advice about environment variables; the first says what happened."""
    outcome = self_test.self_test("cuda:7")
    assert not outcome.passed
    assert outcome.remark.code == "self_test.not_run"

    def no_kernel_image(model: nn.Module) -> nn.Module:
        raise RuntimeError("CUDA error: no kernel image is available\nFor debugging consider passing …")

    monkeypatch.setattr("qwen2_fp16_fix.in_place.fix", no_kernel_image)
    outcome = self_test.self_test("cpu")
    assert (outcome.passed, outcome.remark.code) == (False, "self_test.not_run")
    assert remarks.in_words(outcome.remark, "en").endswith("(RuntimeError: CUDA error: no kernel image is available).")


def test_the_self_test_draws_no_random_numbers() -> None:
    """Called in the middle of an experiment it must not change what a seed gives."""
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    self_test.self_test("cpu")
    assert torch.equal(torch.rand(3), expected)


def test_the_model_of_the_self_test_needs_every_repair() -> None:
    """Layers with an exponent hand on fp32: were the residual's layers scaled, nothing would test its promotion."""
    model = qwen2_fp16_fix.fix(self_test.stock_model("eager").half())
    ranges = qwen2_fp16_fix.status(model).model.ranges
    assert [layer.mlp > 0 for layer in ranges] == [False, False, False, True]
    assert all(layer.keys == "centred" for layer in ranges)
