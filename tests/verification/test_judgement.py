"""What makes a verification fail, and how a terminal and an exit code say so."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qwen2_fp16_fix.cli import commands
from qwen2_fp16_fix.errors import ExportError
from qwen2_fp16_fix.files.packaged import DEMO_CHECKPOINT
from qwen2_fp16_fix.verification import text, verify
from qwen2_fp16_fix.verification.judgement import shortcomings
from qwen2_fp16_fix.verification.result import MeasuredRow, VerificationResult, VerifiedRow
from qwen2_fp16_fix.verification.saved import read_saved
from tests.commands.in_process import run_command
from tests.verification.letters import row

QUICK = ("--tokens", "40", "--window", "32", "--device", "cpu")

pytestmark = pytest.mark.xdist_group("verify")  # one worker runs the demo's table once, for all


def test_findings_are_json_and_are_rendered(findings: VerificationResult, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(json.dumps(findings.to_dict(), allow_nan=False)) == findings.to_dict()
    for given in (findings, findings.to_dict()):  # both go into the model card of an export
        assert read_saved(given, ExportError) == findings.to_dict()
    Console(width=80).print(findings)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "stock fp16 eager" in shown
    assert "Verified: every fixed row is finite" in shown
    assert "not finite: stock float16 eager" in " ".join(shown.split())


def made_up(dtype: str, attention: str, fixed: bool, kl: float, drift: float) -> VerifiedRow:
    """A finite row with this mean KL and this drift."""
    return VerifiedRow(
        name=f"{'fixed' if fixed else 'stock'} {dtype} {attention}",
        dtype=dtype,
        attention=attention,
        fixed=fixed,
        finite=True,
        perplexity=18.8,
        kl_mean=kl,
        kl_max=4 * kl,
        top1_agreement=1.0,
        largest_logit_difference=0.01,
        first_overflow=None,
        first_differences=(None, None, None),
        first_margins=(None, None, None),
        seconds=1.0,
        peak_bytes=None,
        drift=drift,
    )


ROWS = (
    made_up("float32", "eager", False, 0.0, 0.0),
    made_up("float16", "eager", True, 2e-6, 1e-4),
    made_up("float16", "sdpa", True, 3e-6, 2e-4),
    made_up("bfloat16", "eager", False, 2.0, 2.0),
    made_up("bfloat16", "sdpa", True, 1e-3, 1e-2),
)


def test_thresholds_and_overflows_are_named() -> None:
    """On rows that are made up, which need no model. The tests below ask the same of the demo's."""
    assert not shortcomings(ROWS, 1.0, 1.0)
    (reason,) = shortcomings(ROWS, 2.5e-6, None)
    assert reason == "fixed float16 sdpa has a mean KL of 3e-06, above 2.5e-06"
    (reason,) = shortcomings(ROWS, None, 1.5e-4)
    assert reason == "fixed float16 sdpa has a perplexity drift of +0.0002, beyond 0.00015"
    low = [replace(each, drift=-0.5) if each.name == "fixed float16 eager" else each for each in ROWS]
    assert shortcomings(low, None, 0.1) == ["fixed float16 eager has a perplexity drift of -0.5, beyond 0.1"]
    broken = replace(ROWS[-1], finite=False, first_overflow="layer 1, residual stream")
    assert shortcomings([*ROWS[:-1], broken], None, None) == [
        "fixed bfloat16 sdpa is not finite, first in layer 1, residual stream"
    ]


def test_a_greedy_text_that_differs_is_explained() -> None:
    """ "2/3" stood there, and nobody could tell a tie from a fault."""
    parted = replace(ROWS[1], first_differences=(None, 16, 3), first_margins=(None, 0.004, 1.5))
    tie, fault = text.differing_texts(parted)
    assert tie.startswith("fixed float16 eager: greedy text 2 of 3 differs from fp32's from token 17 on. A tie: ")
    assert "by 0.004 logits only, and this row's logits are up to 0.01 away" in tie
    assert "from token 4 on. No tie: there fp32 prefers its own token by 1.5 logits" in fault
    assert "这是近似并列" in next(text.differing_texts(parted, "zh"))
    ties = replace(parted, first_differences=(None, 16, None))
    assert [text._kind_of_text(row) for row in (ROWS[1], ties, parted)] == ["same", "tie", "differs"]
    ended = replace(parted, first_margins=(None, None, None))
    assert text._kind_of_text(ended) == "differs"
    coarse = replace(parted, dtype="bfloat16", largest_logit_difference=22.0)
    assert (list(text.differing_texts(coarse)), text._kind_of_text(coarse)) == ([], "differs")


def test_shortcomings_name_the_row(findings: VerificationResult) -> None:
    broken, fixed = list(findings.rows), row(findings, "fixed float16 eager")
    kl, drift = fixed.kl_mean, fixed.drift
    assert not shortcomings(broken, 1.0, 1.0)
    (reason,) = {r.split(" has ")[1] for r in shortcomings(broken, kl / 2, 1.0) if " eager " in r}
    assert reason == f"a mean KL of {kl:.3g}, above {kl / 2:g}"
    assert any("drift" in reason for reason in shortcomings(broken, None, abs(drift) / 2))
    broken[-1] = replace(broken[-1], finite=False, first_overflow="layer 1, residual stream")
    assert shortcomings(broken, None, None) == ["fixed bfloat16 sdpa is not finite, first in layer 1, residual stream"]


def test_a_drift_that_is_negative_or_unknown_counts(findings: VerificationResult) -> None:
    """A drift below 0 is a drift, and one that is unknown is not a small one."""
    for drift in (-0.5, None):
        rows = [replace(row, drift=drift) if row.name == "fixed float16 sdpa" else row for row in findings.rows]
        assert len(shortcomings(rows, None, 0.1)) == 1


def measured(row: VerifiedRow) -> MeasuredRow:
    """The row as it was before its drift was known."""
    return MeasuredRow(**{key: value for key, value in vars(row).items() if key != "drift"})


@pytest.mark.parametrize(
    ("extra", "code", "verdict"),
    [
        ([], 0, "Verified: "),
        (["--max-kl", "1", "--max-ppl-drift", "1"], 0, "Verified: "),
        (["--max-kl", "0"], 1, "Not verified: fixed float16 eager has a mean KL"),
        (["--max-ppl-drift", "0"], 1, "Not verified: fixed float16 eager has a perplexity drift"),
    ],
)
def test_thresholds_decide_the_exit_code(
    findings: VerificationResult, monkeypatch: pytest.MonkeyPatch, extra: list[str], code: int, verdict: str
) -> None:
    monkeypatch.setattr(verify, "measure", lambda inputs, of: measured(row(findings, of.name)))
    done = CliRunner().invoke(commands.app, ["verify", str(DEMO_CHECKPOINT), "--json", *QUICK, *extra])
    found = json.loads(done.stdout)
    assert (done.exit_code, found["passed"]) == (code, code == 0)
    assert found["verdict"].startswith(verdict)


def test_wrong_usage_is_said_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, complaint = run_command(monkeypatch, capsys, "verify", str(tmp_path / "elsewhere"))
    assert (code, complaint.startswith("qwen2-fp16-fix: there is no ")) == (2, True)
    monkeypatch.setenv("QWEN2_FP16_FIX", "0")
    code, _, complaint = run_command(monkeypatch, capsys, "verify", str(DEMO_CHECKPOINT))
    assert (code, "QWEN2_FP16_FIX=0 switches the fix off" in complaint) == (2, True)
