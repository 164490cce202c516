"""What a command has found outlives its printing, whatever stdout is; and a crash is not taken for a finding."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen2_fp16_fix import demo, locking
from qwen2_fp16_fix.cli import main
from tests.helpers import ROOT

COMMAND = ("-m", "qwen2_fp16_fix")
SCAN = ("scan", str(demo.CHECKPOINT), "--fixed", "--device", "cpu", "--json")
FULL = Path("/dev/full")


def into(stdout: int, *arguments: str, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """A command whose stdout is this file descriptor."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *COMMAND, *arguments]
    return subprocess.run(command, stdout=stdout, stderr=stderr, text=True, check=False, env=environment)


def into_a_closed_pipe(*arguments: str, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return into(writer, *arguments, stderr=stderr)
    finally:
        os.close(writer)


@pytest.mark.process
def test_characters_that_stdout_lacks_do_not_end_a_scan(python: Callable[..., Any], tmp_path: Path) -> None:
    """A token's `␣` on a stdout in cp1252 was a UnicodeEncodeError after the run, and the file was not written."""
    data = tmp_path / "scan.json"
    done = python(*COMMAND, *SCAN, str(data), PYTHONIOENCODING="cp1252", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(data.read_text(encoding="utf-8"))["fixed"]["verdict"]


@pytest.mark.process
@pytest.mark.skipif(os.name != "posix", reason="pipes break in other ways elsewhere")
def test_a_closed_pipe_does_not_lose_the_file(tmp_path: Path) -> None:
    """`scan --json a.json | head -1` printed first, died of that and wrote nothing."""
    data = tmp_path / "scan.json"
    done = into_a_closed_pipe(*SCAN, str(data))
    assert done.returncode == 141, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert json.loads(data.read_text(encoding="utf-8"))["fixed"]["finite"]


@pytest.mark.process
@pytest.mark.skipif(os.name != "posix", reason="pipes break in other ways elsewhere")
def test_a_run_continues_when_nobody_reads_its_progress(tmp_path: Path) -> None:
    """`scan … 2>&1 | head -1` ended at the second line of progress, with a finding's exit code and no file."""
    data = tmp_path / "scan.json"
    assert into_a_closed_pipe(*SCAN, str(data), stderr=subprocess.STDOUT).returncode == 141
    assert json.loads(data.read_text(encoding="utf-8"))["fixed"]["finite"]


@pytest.mark.process
@pytest.mark.skipif(os.name != "posix", reason="pipes break in other ways elsewhere")
@pytest.mark.parametrize("arguments", [("status", "--json"), ("status",), ("--version",)])
def test_a_closed_pipe_has_an_exit_code_of_its_own(arguments: tuple[str, ...]) -> None:
    """What was printed last was written when Python ended, with a complaint and the exit code 120."""
    done = into_a_closed_pipe(*arguments)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.process
@pytest.mark.skipif(not FULL.exists(), reason="needs Linux's full device")
@pytest.mark.parametrize("arguments", [("status", "--json"), ("--version",)])
def test_a_full_stdout_is_one_sentence(arguments: tuple[str, ...]) -> None:
    """It was a traceback, or a complaint of Python's and the exit code 120."""
    with FULL.open("w") as full:
        done = into(full.fileno(), *arguments)
    assert done.returncode == 2
    assert (
        done.stderr == "qwen2-fp16-fix: stdout cannot be written (No space left on device): send it somewhere else.\n"
    )


LONG = "x" * 300  # no file system has names of that length


@pytest.mark.parametrize(
    "arguments",
    [
        *(("scan", LONG), ("verify", LONG), ("certify", LONG), ("doctor", LONG), ("export", LONG, "out")),
        *(("push", LONG, "a/b", "--dry-run"), ("check", "lock.json", "--folder", LONG), ("lock", "-o", LONG)),
        *(("scan", str(demo.CHECKPOINT), "--json", LONG), ("verify", str(demo.CHECKPOINT), "--resume", LONG)),
        *(("scan", str(demo.CHECKPOINT), "--prompts", LONG), ("demo", "--save", LONG)),
        ("scan", "locked"),
    ],
    ids=lambda arguments: " ".join(arguments).replace(LONG, "LONG").replace(str(demo.CHECKPOINT), "DEMO"),
)
def test_a_path_that_the_system_refuses_is_one_sentence(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before Python 3.14, asking whether it is there raises, with a traceback; so do folders one may not look into."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lock.json").write_text(locking.as_text(locking.make_lock()))
    monkeypatch.setattr(sys, "argv", ["qwen2-fp16-fix", *arguments])
    monkeypatch.setattr("qwen2_fp16_fix.verification.verify._fill", lambda *_: pytest.fail("ran before the check"))
    monkeypatch.setattr("qwen2_fp16_fix.scanning.scan.measure_prompts", lambda *_: pytest.fail("ran before the check"))
    if "locked" in arguments:
        monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(SystemExit) as ended:
        main.main()
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("hashing")]
    assert (ended.value.code, len(said)) == (2, 1), said
    assert said[0].startswith("qwen2-fp16-fix: ")


def denied(path: Path) -> bool:
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_an_error_of_the_system_names_its_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever call it comes from: rights, full disks and the like are no crash."""
    monkeypatch.setattr(main, "app", lambda: denied(Path("/x/y")))
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    sentence = f"{Path('/x/y')}: Permission denied: name another file or folder, or change its rights."
    assert capsys.readouterr().err == f"qwen2-fp16-fix: {sentence}\n"


def test_a_crash_has_an_exit_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python ends it with 1, which a CI job reads as a verdict on the checkpoint."""

    def crash() -> None:
        raise ZeroDivisionError("of a kind that nobody foresaw")

    monkeypatch.setattr(main, "app", crash)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 70
    assert "ZeroDivisionError: of a kind that nobody foresaw" in capsys.readouterr().err
