"""A verification that was cut off is resumed from its file, and from no other."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import qwen2_fp16_fix
from qwen2_fp16_fix.verification import rows, verify
from qwen2_fp16_fix.verification.result import MeasuredRow
from qwen2_fp16_fix.verification.resume import FinishedRows
from tests.files.damage import damaged
from tests.verification.letters import CPU, SHORT, TEXT, table, tokenizer


def test_a_run_that_was_cut_off_is_resumed(
    checkpoint: Path, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished rows are not run again but for the oracle, whose logits the others need."""
    monkeypatch.setattr(rows, "NEW_TOKENS", 4)
    planned = [row for row in rows.planned_rows(CPU) if row.attention == "eager" and row.dtype != "bfloat16"]
    monkeypatch.setattr(verify, "planned_rows", lambda device: planned)
    file = tmp_path / "rows.json"
    plain = verify.measure

    def cut(bench: Any, of: Any) -> Any:
        if of.name == "stock float16 eager":
            raise KeyboardInterrupt
        return plain(bench, of)

    monkeypatch.setattr(verify, "measure", cut)
    with pytest.raises(KeyboardInterrupt):
        table(checkpoint, resume=file)
    monkeypatch.setattr(verify, "measure", plain)
    assert len(json.loads(file.read_text())["rows"]) == len(loads) == 2
    loads.clear()
    resumed = table(checkpoint, resume=file)
    assert (loads[0], len(loads)) == ("stock float32 eager", 3)
    assert "fixed float32 eager" not in loads
    loads.clear()
    assert table(checkpoint, resume=file).rows == resumed.rows
    assert loads == []
    timeless, fresh = (
        [replace(row, seconds=0, peak_bytes=None) for row in found.rows] for found in (resumed, table(checkpoint))
    )
    assert fresh == timeless
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.usefixtures("few_rows")
def test_a_resume_file_of_another_run_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are compared whole: here one of them is changed, and nothing else."""
    file = tmp_path / "rows.json"
    table(checkpoint, resume=file)
    refused = qwen2_fp16_fix.VerificationError
    for change in ({"window": 20}, {"stride": 3}, {"tokens": 50}):
        with pytest.raises(refused, match="was made with another"):
            table(checkpoint, resume=file, **change)
    with pytest.raises(refused, match="was made with another text: "):
        qwen2_fp16_fix.verify(checkpoint, TEXT + "x", tokenizer=tokenizer, resume=file, **SHORT)
    stored = json.loads(file.read_text())
    stored["key"]["set of versions"]["torch"] = "1.0"
    (tmp_path / "old.json").write_text(json.dumps(stored))
    with pytest.raises(refused, match="another set of versions: "):
        table(checkpoint, resume=tmp_path / "old.json")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] += 1
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(refused, match="another checkpoint: "):
        table(checkpoint, resume=file)
    monkeypatch.setattr(verify, "measure", lambda *_: pytest.fail("hours of work before the file is tried"))
    with pytest.raises(refused, match="cannot be written"):
        table(checkpoint, resume=tmp_path / "no folder" / "rows.json")


def test_a_resume_file_that_cannot_be_written_is_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    """What was begun could not be removed either, and that was the traceback shown."""
    (tmp_path / "file").touch()
    with pytest.raises(qwen2_fp16_fix.VerificationError, match=r"cannot be written \(Not a directory"):
        table(checkpoint, resume=tmp_path / "file" / "rows.json")


def test_a_file_that_is_damaged_anywhere_is_refused_before_the_run(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that was missing, or a text for a number, was a traceback once the rows had run."""
    file, whole = tmp_path / "rows.json", FinishedRows(tmp_path / "rows.json")
    whole.begin({"window": 4})
    whole.add(
        MeasuredRow("stock", "float16", "eager", False, True, 2.5, *[0.0] * 4, None, (None, 3), (None, 0.5), 1, 5)
    )
    assert FinishedRows(file).rows == whole.rows
    monkeypatch.setattr(verify, "tokens_of", lambda *_: pytest.fail("ran before the file was read"))
    refused, data = qwen2_fp16_fix.VerificationError, json.loads(file.read_text())
    for broken, place in damaged(data):
        file.write_text(json.dumps(broken))
        with pytest.raises(refused, match=f"holds no finished rows.*{re.escape(place)}"):
            FinishedRows(file)
    with pytest.raises(refused, match="holds no finished rows"):
        table(checkpoint, resume=file)
    data["rows"][0]["perplexity"] = 0
    for content in ("", "[]", "\xff", "[" * 10**5, json.dumps(data)):
        file.write_text(content, encoding="latin-1")
        with pytest.raises(refused, match=r"rows\.json is not|perplexity is 0, not a number of at least 1"):
            FinishedRows(file)
