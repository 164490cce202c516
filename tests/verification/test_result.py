"""A verification's result: the JSON it always was, key by key, one line in a REPL, and the terminal's table."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import qwen2_fp16_fix
from qwen2_fp16_fix.verification.result import VerificationResult
from tests.helpers import skeleton
from tests.verification.letters import SHORT, TEXT, table, tokenizer

pytestmark = pytest.mark.xdist_group("verify")  # one worker runs the demo's table once, for all

RECORDED = Path(__file__).parent / "recorded_verification.json"


def test_plain_data_is_what_it_was_as_a_dict(loads_and_table: tuple[list[str], VerificationResult]) -> None:
    """Recorded when `verify` returned a dict: every key, in the same order, with a value of the same kind."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    found = json.loads(json.dumps(loads_and_table[1].to_dict()))
    for row in (*found["rows"], *recorded["rows"]):
        row["peak_bytes"] = None  # a number where the system tells it
    assert skeleton(found) == skeleton(recorded)
    assert [row["name"] for row in found["rows"]] == [row["name"] for row in recorded["rows"]]
    assert found["settings"] == recorded["settings"]
    for row, before in zip(found["rows"], recorded["rows"], strict=True):
        assert row["perplexity"] == pytest.approx(before["perplexity"], rel=1e-2)  # bfloat16 has 8 bits


def test_a_result_is_one_line_in_a_repl(findings: VerificationResult) -> None:
    assert repr(findings) == f"<VerificationResult: {findings.verdict}>"
    assert "\n" not in repr(findings)


def test_a_notebook_shows_the_table(findings: VerificationResult) -> None:
    assert "stock fp16 eager" in findings._repr_html_()


@pytest.mark.usefixtures("few_rows")
def test_progress_is_on_stderr_or_nowhere(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """True was a traceback: a bool is no rich Console."""
    qwen2_fp16_fix.verify(checkpoint, TEXT, tokenizer=tokenizer, progress=True, resume=tmp_path / "rows", **SHORT)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("hashing the checkpoint, so that --resume can recognise it …")
    assert said.err.endswith("verifying …\n")
    table(checkpoint, progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_fits_its_width(findings: VerificationResult, width: int) -> None:
    page = io.StringIO()
    Console(file=page, width=width).print(findings)
    assert max(map(len, page.getvalue().splitlines())) <= width
    assert "…" not in page.getvalue()
