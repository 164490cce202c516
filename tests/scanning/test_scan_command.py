"""The command `scan`: its files are checked before the run and written whole, and its exit code is the verdict."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import qwen2_fp16_fix
from qwen2_fp16_fix.report import files
from tests.commands.in_process import run_command
from tests.scanning.planted import PROMPT, command, refused, text_of

pytestmark = pytest.mark.xdist_group("scan")  # one worker builds the checkpoints, for all


def test_the_command_names_what_was_planted_and_its_exit_code_says_so(
    folders: Callable[..., Path], tmp_path: Path
) -> None:
    prompts, data = tmp_path / "prompts.txt", tmp_path / "scan.json"
    prompts.write_text(f"{text_of(PROMPT)}\n\nAB\n")
    done = command(folders("swiglu"), "--prompts", prompts, "--stock", "--output", data)
    assert done.exit_code == 1, done.output
    assert re.search(r"breaks first in layer 2, down_proj, channel 3,\s+token \d+\s+`.`", done.stdout)
    found = json.loads(data.read_text())
    assert found.keys() == {"stock"}
    assert [prompt["tokens"] for prompt in found["stock"]["prompts"]] == [48, 2]
    done = command(folders("swiglu"), "--prompts", prompts, "--fixed", "--lang", "zh")
    assert done.exit_code == 0, done.output
    assert "修复后 float16（eager）" in done.stdout


def test_errors_are_one_sentence_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed, complaint = run_command(monkeypatch, capsys, "scan", str(tmp_path / "no"))
    assert (code, printed) == (2, "")
    assert complaint.startswith("qwen2-fp16-fix: there is no ")
    assert len(complaint.splitlines()) == 1


@pytest.mark.usefixtures("never_run")
def test_bad_files_are_refused_before_the_run_and_are_not_touched(
    folders: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, there = folders("scores"), tmp_path / "there.html"
    there.write_text("mine")
    assert "there.html exists: name another file, or add --force" in refused(folder, "--report", there)
    assert there.read_text() == "mine"
    assert "cannot be written (No such file" in refused(folder, "--output", tmp_path / "no" / "x.json")
    assert "it is a folder" in refused(folder, "--png", tmp_path)
    assert "cannot be written (Not a directory" in refused(folder, "--output", there / "x.json")
    with monkeypatch.context() as later:
        later.setattr(Path, "is_dir", lambda path: False)  # as from Python 3.14
        later.setattr(Path, "exists", lambda path: False)
        assert "cannot be written (File name too long" in refused(folder, "--output", tmp_path / ("x" * 300))
    both = tmp_path / "one"
    assert "have the same name" in refused(folder, "--output", both, "--report", both)
    assert "add --report OUT.html" in refused(folder, "--verification", there)
    report = tmp_path / "out.html"
    for content in (
        "mine",
        "[]",
        '{"rows": [], "settings": {}}',
        '{"rows": [{}], "settings": {"tokens": 1, "window": 1}}',
    ):
        there.write_text(content)
        assert "`qwen2-fp16-fix verify PATH --json` prints" in refused(
            folder, "--report", report, "--verification", there
        )
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    wanted = 'needs matplotlib and jinja2: run pip install "qwen2-fp16-fix[report]"'
    assert wanted in refused(folder, "--report", report)
    assert "--png needs matplotlib" in refused(folder, "--png", report)
    assert not report.exists()


def test_force_overwrites_and_a_failed_write_leaves_the_old_file(
    folders: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, prompts = tmp_path / "scan.json", tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["AB\nC"]))
    data.write_text("old")
    assert command(folders("keys"), "--prompts", prompts, "--output", data, "--force").exit_code == 0
    written = data.read_text()
    assert json.loads(written)["stock"]["prompts"] == [{"text": "AB\nC", "tokens": 3}]

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    sentence = refused(folders("keys"), "--prompts", prompts, "--output", data, "--force")
    assert "No space left on device" in sentence
    assert data.read_text() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.json", "scan.json"]


def test_a_scan_is_printed_even_if_its_file_cannot_be_written(
    folders: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may fill during the run: what was found is printed all the same."""

    def fail(*_: object) -> None:
        raise qwen2_fp16_fix.ScanError("the disk is full.")

    monkeypatch.setattr(files.ScanFiles, "write", fail)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("AB")
    done = command(folders("keys"), "--prompts", prompts, "--output", tmp_path / "scan.json")
    assert isinstance(done.exception, qwen2_fp16_fix.ScanError)
    assert "tightest" in done.stdout


def test_a_name_that_is_just_short_enough_is_written(folders: Callable[..., Path], tmp_path: Path) -> None:
    """The longer name that it had while it was written was one too long: a refusal after the run."""
    data, prompts = tmp_path / ("n" * 250), tmp_path / "prompts.txt"
    prompts.write_text("AB")
    assert command(folders("keys"), "--prompts", prompts, "--output", data).exit_code == 0
    assert json.loads(data.read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([data.name, prompts.name])


@pytest.mark.usefixtures("never_run")
@pytest.mark.parametrize("asked", ["--report", "--png"])
def test_a_switched_off_fix_is_noticed_before_stock_runs(
    asked: str, folders: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report is of both: stock ran to its end, and then fixed was refused and nothing written."""
    monkeypatch.setenv("QWEN2_FP16_FIX", "0")
    assert "QWEN2_FP16_FIX=0" in refused(folders("scores"), asked, tmp_path / "out")
