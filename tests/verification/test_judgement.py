"""What makes a verification fail, and how a terminal and an exit code say so."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qwen2_fp16_fix.cli import commands as cli
from qwen2_fp16_fix.files import DEMO_CHECKPOINT as CHECKPOINT
from qwen2_fp16_fix.hub.model_card import read_verification
from qwen2_fp16_fix.verification import verify
from qwen2_fp16_fix.verification.judgement import shortcomings
from qwen2_fp16_fix.verification.result import MeasuredRow, VerificationResult, VerifiedRow
from tests.verification.letters import row

pytestmark = pytest.mark.xdist_group("verify")  # one worker runs the demo's table once, for all


def test_findings_are_json_and_are_rendered(findings: VerificationResult, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(json.dumps(findings.to_dict(), allow_nan=False)) == findings.to_dict()
    for given in (findings, findings.to_dict()):  # both go into the model card of an export
        assert read_verification(given) == findings.to_dict()
    Console(width=80).print(findings)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "stock fp16 eager" in shown
    assert "Verified: every fixed row is finite" in shown
    assert "not finite: stock float16 eager" in " ".join(shown.split())


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
    ("extra", "code"), [([], 0), (["--max-kl", "1", "--max-ppl-drift", "1"], 0), (["--max-kl", "0"], 1)]
)
def test_thresholds_decide_the_exit_code(
    findings: VerificationResult, monkeypatch: pytest.MonkeyPatch, extra: list[str], code: int
) -> None:
    monkeypatch.setattr(verify, "measure", lambda inputs, of: measured(row(findings, of.name)))
    done = CliRunner().invoke(cli.app, ["verify", str(CHECKPOINT), "--json", "--device", "cpu", *extra])
    found = json.loads(done.stdout)
    assert (done.exit_code, found["passed"]) == (code, code == 0)
    assert found["verdict"].startswith("Not verified: fixed float16 eager has a mean KL" if code else "Verified: ")


@pytest.mark.process
def test_the_command_and_its_exit_codes(python: Callable[..., Any], tmp_path: Path) -> None:
    command = ("-m", "qwen2_fp16_fix", "verify")
    quick = ("--tokens", "40", "--window", "32", "--device", "cpu")
    done = python(*command, str(CHECKPOINT), *quick, "--max-ppl-drift", "0")
    assert (done.returncode, "Not verified: fixed float16" in done.stdout) == (1, True), done.stderr
    assert "Traceback" not in done.stderr
    done = python(*command, str(tmp_path / "elsewhere"))
    assert (done.returncode, done.stderr.startswith("qwen2-fp16-fix: there is no ")) == (2, True)
    done = python(*command, str(CHECKPOINT), QWEN2_FP16_FIX="0")
    assert (done.returncode, "QWEN2_FP16_FIX=0 switches the fix off" in done.stderr) == (2, True)
