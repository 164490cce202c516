"""A report does not say whose machine it is from."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import qwen2_fp16_fix
from qwen2_fp16_fix import demo, locking
from qwen2_fp16_fix.diagnosis import doctor, redaction, remarks, self_test
from qwen2_fp16_fix.diagnosis.self_test import Outcome
from qwen2_fp16_fix.translations import DOCTOR_TEXTS
from tests.diagnosis.examples import SECRET, copy_of_demo


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("/data/zanzibar/x.json is no lock", "… is no lock"),
        ("found '/data/zanzibar/x', and", "found '…', and"),
        ("/home/zanzibar/deep/er: no", "~: no"),
        ("~/zanzibar/x", "~"),
        (r"C:\Users\zanzibar\model cannot be read", "… cannot be read"),
        (r"\\server\zanzibar\model", "…"),
        ("/models/Zoo (1)/zanzibar/model.safetensors is damaged", "PATH/model.safetensors is damaged"),
        ("token hf_zanzibarzanzibar", "token …"),
        ("act(gate)·up and q/k are 1/2 of 3 / 4", "act(gate)·up and q/k are 1/2 of 3 / 4"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("python 3.11, torch 2.13.0+cpu", "python 3.11, torch 2.13.0+cpu"),
    ],
)
def test_private_text_is_redacted(text: str, redacted: str) -> None:
    places = {"/models/Zoo (1)/zanzibar": "PATH", "/home/zanzibar": "~"}
    assert redaction.redact({"a": [text, {"b": 1}]}, places) == {"a": [redacted, {"b": 1}]}


def test_every_spelling_of_the_path_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    places = redaction.private_places(Path("link"))
    for spelling in (str(tmp_path / "link"), str(tmp_path / "real")):
        assert redaction.redact(f"in {spelling}.", places) == "in PATH."
    monkeypatch.setenv("HOME", "/")
    assert "/" not in redaction.private_places(None)


def renderings(path: Path, language: str) -> str:
    found = qwen2_fp16_fix.doctor(path, language=language, redacted=True)
    with Console(width=100, record=True, file=io.StringIO()) as console:
        console.print(found, soft_wrap=True)
        console.print(found.details(), soft_wrap=True)
    return json.dumps(found.to_dict(), ensure_ascii=False) + console.export_text() + repr(found) + found._repr_html_()


@pytest.mark.parametrize("state", ["whole", "damaged", "incomplete", "empty"])
def test_a_report_does_not_say_whose_machine_it_is(
    state: str, healthy: None, somebodys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors quote paths, and the report is made to be pasted into public issues."""
    path = copy_of_demo(somebodys / f"{SECRET}-model", _name_or_path=f"/x/{SECRET}")
    weights = path / "model.safetensors"
    if state == "damaged":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif state == "incomplete":
        index = {"weight_map": dict.fromkeys(["model.norm.weight"], "model-00001-of-00002.safetensors")}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    elif state == "empty":
        weights.unlink()
    error = qwen2_fp16_fix.CheckpointError(f"{somebodys}/{locking.FILE_NAME} is no lock")
    monkeypatch.setattr(doctor, "lock_differences", lambda path: [str(error)])
    reason = remarks.remark("self_test.not_run", device="cpu", reason=f"OSError: {Path.home()}/.cache/x")
    monkeypatch.setattr(self_test, "self_test", lambda place: Outcome([], False, reason))
    for language in DOCTOR_TEXTS:
        said = renderings(path, language)
        assert SECRET not in said
        assert locking.FILE_NAME in said  # the rest of the sentence is there


@pytest.mark.usefixtures("healthy")
def test_a_relative_path_is_private_too(somebodys: Path) -> None:
    """A name alone cannot be searched for in every text ("m" is in most), so no sentence may have it to begin with."""
    path = copy_of_demo(somebodys / SECRET)
    (path / "model.safetensors").unlink()
    said = renderings(Path(SECRET), "en")
    assert SECRET not in said
    assert "PATH has no model.safetensors" in " ".join(said.split())


@pytest.mark.usefixtures("healthy")
def test_the_owner_of_foreign_code_is_private(tmp_path: Path) -> None:
    """An export whose configuration names code in somebody's repository differs from its lock, which is quoted."""
    out = qwen2_fp16_fix.export(demo.CHECKPOINT, tmp_path / "out")
    (out / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": [f"{SECRET}/a--tok.T", None]}})
    )
    said = renderings(out, "en")
    assert SECRET not in said
    assert "names tok.T, which is not in the lock" in " ".join(said.split())


@pytest.mark.process
def test_the_command_does_not_say_whose_machine_it_is(somebodys: Path, python: Callable[..., Any]) -> None:
    path = copy_of_demo(somebodys / f"{SECRET}-model")
    done = python("-m", "qwen2_fp16_fix", "doctor", str(path), "--redact")
    assert done.returncode == 0, done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout  # plain when piped
    assert done.stdout.startswith("Breaks in stock float16: ")
    assert not re.search(" $", done.stdout, re.M)
    assert "Traceback" not in done.stderr
