"""The rows of a verification are what their names say, and what a plain computation gives."""

import math
from pathlib import Path

import pytest
import torch

import qwen2_fp16_fix
from qwen2_fp16_fix.checkpoints.loading import forward, load
from qwen2_fp16_fix.verification import rows, verify
from qwen2_fp16_fix.verification.result import VerificationResult
from tests.helpers import kl_to
from tests.verification.letters import CPU, TEXT, row, table, tokenizer

pytestmark = pytest.mark.xdist_group("verify")  # one worker runs the demo's table once, for all


@pytest.mark.usefixtures("few_rows")
def test_a_row_is_the_plain_computation(checkpoint: Path) -> None:
    """Token by token, each with the context its window gives it, from a model loaded here."""
    found = row(table(checkpoint), "fixed float16 eager")
    tokens = tokenizer(TEXT, "pt")["input_ids"][:, :60]
    oracle = load(checkpoint, False, torch.float32, "eager")
    model = load(checkpoint, True, torch.float16, "eager")
    losses, divergences = [], []
    for token in range(1, 60):
        start = 0 if token < 24 else 12 * ((token - 24) // 12 + 1)
        end = min(start + 24, 60)
        theirs, own = (forward(m, tokens[:, start:end])[0, token - 1 - start].double() for m in (oracle, model))
        losses.append(-float(own.log_softmax(-1)[tokens[0, token]]))
        divergences.append(kl_to(theirs, own))
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 59), rel=1e-9)
    assert found.kl_mean == pytest.approx(sum(divergences) / 59, rel=1e-6, abs=1e-12)
    assert found.kl_max == pytest.approx(max(divergences), rel=1e-6, abs=1e-12)


def test_the_demo_verifies_and_only_stock_float16_breaks(findings: VerificationResult) -> None:
    names = [row.name for row in findings.rows]
    assert len(names) == len(set(names)) == 12
    for found in findings.rows:
        assert found.finite == (found.fixed or found.dtype != "float16"), found.name
        if not found.finite:
            assert {getattr(found, key) for key in rows.UNKNOWN} == {found.drift} == {None}
            assert found.first_differences == (0, 0, 0)
    assert row(findings, "stock float16 eager").first_overflow == "layer 0, raw scores q·k"
    assert row(findings, "stock float16 sdpa").first_overflow.startswith("layer 2, ")
    for attention in ("eager", "sdpa"):
        fixed = row(findings, f"fixed float16 {attention}")
        assert fixed.kl_mean < 1e-5  # the demo's own bound on this text; measured 1.2e-6
        assert abs(fixed.drift) < 3e-4  # float16's noise of 1.7e-3 a token over the root of 399, thrice
        assert fixed.first_overflow is None
    stock, fixed = (row(findings, f"{kind} bfloat16 eager") for kind in ("stock", "fixed"))
    assert stock.kl_mean > 1000 * fixed.kl_mean
    assert findings.passed


def test_the_oracle_row_is_the_oracle_and_fixed_fp32_equals_it(findings: VerificationResult) -> None:
    for found in (findings.rows[0], row(findings, "fixed float32 eager")):
        assert (found.drift, found.kl_mean, found.kl_max, found.largest_logit_difference) == (0, 0, 0, 0)
        assert (found.top1_agreement, found.first_differences) == (1, (None, None, None))


def test_a_row_that_is_not_what_it_is_called_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock classes taken over in this process, as `run` does, or a fixed model without its fix."""
    fixed = rows.Row("float16", "eager", fixed=True)
    stock = rows.Row("float16", "eager", fixed=False)
    other = rows.Row("float16", "sdpa", fixed=False)
    for asked, found in ((stock, fixed), (fixed, stock), (other, stock)):
        model = load(checkpoint, found.fixed, torch.float16, found.attention)
        monkeypatch.setattr(rows, "load", lambda *_, model=model: model)
        with pytest.raises(qwen2_fp16_fix.PatchConflictError, match=f"{asked.name} was loaded as {found.name}"):
            rows.open_row(checkpoint, asked, CPU)
    model = load(checkpoint, True, torch.float16, "eager")
    model.model.norm.__class__ = type(load(checkpoint, False, torch.float16, "eager").model.norm)
    monkeypatch.setattr(rows, "load", lambda *_: model)
    for asked in (fixed, stock):  # partly fixed is neither
        with pytest.raises(qwen2_fp16_fix.PatchConflictError):
            rows.open_row(checkpoint, asked, CPU)
    monkeypatch.setenv("QWEN2_FP16_FIX", "0")
    with pytest.raises(qwen2_fp16_fix.VerificationError, match="switches the fix off"):
        table(checkpoint)


def test_flash_rows_come_where_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = rows.transformers.utils
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(utils, "is_flash_attn_3_available", lambda: True, raising=False)
    gpu = torch.device("cuda")
    for capability, kernels in (((7, 5), []), ((8, 0), [2]), ((9, 0), [2, 3]), ((10, 0), [2])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert rows.flash_attentions(gpu) == [f"flash_attention_{number}" for number in kernels]
    assert rows.flash_attentions(CPU) == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    planned = verify.planned_rows(gpu)
    assert len(planned) == 12 + 2 * 2 * 2
    assert not any(row.dtype == "float32" and "flash" in row.attention for row in planned)


def test_continuations_are_compared_token_by_token() -> None:
    differs = rows.first_difference
    assert differs([1, 2, 3], [1, 2, 3]) is None
    assert differs([1, 2, 3], [1, 5, 3]) == 1
    assert differs([1, 2], [1, 2, 3]) == 2
    assert [p.tolist() for p in rows.prompts_of(torch.arange(5)[None])] == [[[0, 1, 2, 3, 4]]] * 3
    starts = [int(p[0, 0]) for p in rows.prompts_of(torch.arange(100)[None])]
    assert starts == [0, 34, 68]


def test_a_margin_is_the_oracles_where_the_texts_part() -> None:
    oracle = rows.Continuation([2, 0], torch.tensor([[0.0, 1.0, 3.0], [5.0, 4.5, 0.0]]))
    ours = rows.Continuation([2, 1], torch.zeros(2, 3))
    assert rows.margin_at(1, ours, oracle) == 0.5
    assert rows.margin_at(None, ours, oracle) is None
    assert rows.margin_at(2, ours, oracle) is None  # a text that has ended has no token there


def test_a_continuation_is_the_largest_of_its_logits(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "NEW_TOKENS", 4)
    found = rows.continuation(load(checkpoint, False, torch.float32, "eager"), torch.tensor([[1, 2, 3]]))
    assert found.logits.argmax(-1).tolist() == found.tokens


def test_one_copy_of_the_weights_at_a_time(loads_and_table: tuple[list[str], VerificationResult]) -> None:
    """`watched_loads` would have failed at a load while another model was there."""
    loads, _ = loads_and_table
    assert len(loads) == 12
    assert len(set(loads)) == 12
