"""What a command has found outlives its printing, whatever its streams are; and how it ends says what it found."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from qwen2_fp16_fix import demo, locking
from qwen2_fp16_fix.cli import endings, main, terminal
from tests.commands.in_process import run_command
from tests.helpers import ROOT

DEMO = str(demo.CHECKPOINT)
SCAN = ("scan", DEMO, "--fixed", "--tokens", "4", "--device", "cpu", "--output")
posix = pytest.mark.skipif(os.name != "posix", reason="pipes break in other ways elsewhere")


@contextmanager
def broken_pipe() -> Iterator[io.TextIOWrapper]:
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


@contextmanager
def full() -> Iterator[io.TextIOWrapper]:
    """A full disk."""
    with open("/dev/full", "w") as stream:
        yield stream


@contextmanager
def closed() -> Iterator[None]:
    """As Python starts after `>&-`."""
    yield None


@contextmanager
def old_encoding() -> Iterator[io.TextIOWrapper]:
    """Windows' own letters."""
    with io.TextIOWrapper(io.BytesIO(), encoding="cp1252") as stream:
        yield stream


def code_with(
    monkeypatch: pytest.MonkeyPatch, streams: dict[str, Callable[[], Any]], *arguments: str
) -> int | str | None:
    """The exit code of a command whose stdout or stderr is something else. Every fault has been swallowed."""
    with monkeypatch.context() as patch, ExitStack() as opened:
        made = {name: opened.enter_context(make()) for name, make in streams.items()}
        for name, stream in made.items():
            patch.setattr(sys, name, stream)
        patch.setattr(sys, "argv", ["qwen2-fp16-fix", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        for stream in filter(None, made.values()):
            stream.flush()  # as Python does when it ends; a fault here is a complaint and the exit code 120
        return ended.value.code


#: A command, and how it ends with a stdout that can be written.
COMMANDS = {
    ("lock",): 0,
    ("status", "--json"): 0,
    ("--help",): 0,
    ("--version",): 0,
    ("certify", "/nothing"): 2,
    ("no-such-command",): 2,
}


@posix
@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_no_stream_makes_a_finding(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`2>/dev/full` ended with 1 on a good checkpoint, and `>&-` with a traceback."""
    good = COMMANDS[arguments]
    for stderr in (full, closed, broken_pipe):
        assert code_with(monkeypatch, {"stderr": stderr}, *arguments) == good
    for stdout, code in ((full, 2), (closed, 2), (broken_pipe, 141)):
        capsys.readouterr()
        assert code_with(monkeypatch, {"stdout": stdout}, *arguments) == (good or code)
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert good or code == 141 or "qwen2-fp16-fix: stdout cannot be written (" in said
        assert code_with(monkeypatch, {"stdout": stdout, "stderr": stdout}, *arguments) == (good or code)


@posix
@pytest.mark.parametrize(("stdout", "code"), [(full, 2), (closed, 2), (broken_pipe, 141), (old_encoding, 0)])
def test_a_scan_writes_its_file_whatever_its_streams_are(
    stdout: Any, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`scan --output a.json | head -1` printed first, died of that and wrote nothing; so it did for a token's `␣`."""
    data = tmp_path / "scan.json"
    streams = {"stdout": stdout} if stdout is old_encoding else {"stdout": stdout, "stderr": stdout}
    assert code_with(monkeypatch, streams, *SCAN, str(data)) == code
    assert json.loads(data.read_text(encoding="utf-8"))["fixed"]["finite"]


@pytest.mark.process
@posix
@pytest.mark.parametrize(("redirected", "code"), [(">&- 2>&- <&-", 2), ("| true", 141)])
def test_a_program_of_its_own_ends_the_same(redirected: str, code: int, tmp_path: Path) -> None:
    """What was printed last was written when Python ended, with a complaint and the exit code 120."""
    script = f'"{sys.executable}" -m qwen2_fp16_fix status --json'
    waits = "sleep 0.1; " if "|" in redirected else ""
    line = f"{{ {waits}{script}; echo $? >code; }} {redirected}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (int((tmp_path / "code").read_text()), done.stderr) == (code, "")


@posix
def test_what_was_closed_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next file that is opened, a certificate's, would get the number 2, and what libraries write to stderr."""
    opened = list[str]()
    monkeypatch.setattr(os, "fstat", lambda number: denied(Path("x")) if number == 2 else None)
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append(path))
    terminal._fill_closed_descriptors()
    monkeypatch.undo()
    assert opened == [os.devnull]


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_cleans_up(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM, which `timeout` and `docker stop` send, left what Ctrl-C cleans up. `timeout` sends two."""
    assert threading.current_thread() is threading.main_thread()

    def interrupted(*_: object) -> None:
        (made,) = tmp_path.glob(".out.exporting-*")
        assert made.is_dir()
        os.kill(os.getpid(), number)

    def twice(*arguments: Any, **named: Any) -> None:
        if number != signal.SIGINT:
            os.kill(os.getpid(), number)

    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    outside = signal.signal(number, before)  # a shell has the programs in its background ignore Ctrl-C
    monkeypatch.setattr("qwen2_fp16_fix.files.folders.flush", interrupted)
    monkeypatch.setattr("qwen2_fp16_fix.files.folders.settle", twice)
    try:
        code, _, said = run_command(monkeypatch, capsys, "demo", "--save", str(tmp_path / "out"))
        assert (code, list(tmp_path.iterdir()), signal.getsignal(number)) == (128 + number, [], before)
    finally:
        signal.signal(number, outside)
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("certify", ""),
        ("lock", "-o", ""),
        ("scan", DEMO, "--output="),
        ("push", "x", ""),
        ("export", "", "x"),
    ],
)
def test_an_empty_argument_is_wrong_usage(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`certify "$MODEL"` without that variable was `certify .`. A program that is run has arguments of its own."""
    code, out, said = run_command(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert said.startswith("qwen2-fp16-fix: an argument is empty (")
    endings.check_arguments(["run", "--", "python", ""])


def test_a_folder_that_is_gone_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a traceback, or the end of the program by a library for linear algebra."""
    monkeypatch.setattr(os, "getcwd", lambda: denied(Path("x")))
    code, _, said = run_command(monkeypatch, capsys, "status")
    assert (code, said) == (2, "qwen2-fp16-fix: the current folder is not there any more: change into one that is.\n")


LONG = "x" * 300  # no file system has names of that length


@pytest.mark.parametrize(
    "arguments",
    [
        *(("scan", LONG), ("verify", LONG), ("certify", LONG), ("doctor", LONG), ("export", LONG, "out")),
        *(("push", LONG, "a/b", "--dry-run"), ("check", "lock.json", "--folder", LONG), ("lock", "-o", LONG)),
        *(("scan", str(demo.CHECKPOINT), "--output", LONG), ("verify", str(demo.CHECKPOINT), "--resume", LONG)),
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


#: Inside a command, and where typer reads the arguments.
PLACES = {"command": "qwen2_fp16_fix.model_status.status", "typer": "qwen2_fp16_fix.cli.main.app"}


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "/x/y: Permission denied: name another file"),
        (OSError(errno.EIO, "Input/output error"), 2, "refused something (Input/output error)"),
        (OSError("a library's own\nwords"), 2, "refused something (a library's own)"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, "refused something (Broken pipe)"),
        (KeyboardInterrupt(), 130, "interrupted."),
        (MemoryError(), 2, "there is not enough memory"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("place", PLACES)
def test_what_the_system_refuses_is_one_sentence(
    place: str,
    error: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever call it comes from. typer ends a broken pipe with 1, a finding; older ones so end Ctrl-C."""

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(PLACES[place], fails)
    ended, _, said = run_command(monkeypatch, capsys, "status")
    assert ended == code
    assert said.startswith("qwen2-fp16-fix: ")
    assert words in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("nobody foresaw"), EOFError("nobody foresaw")], ids=repr)
@pytest.mark.parametrize("place", PLACES)
def test_a_crash_has_an_exit_code_of_its_own(
    place: str, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python ends it with 1, which a CI job reads as a verdict on the checkpoint."""

    def crash(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(PLACES[place], crash)
    code, _, said = run_command(monkeypatch, capsys, "status")
    assert code == 70
    assert f"{type(error).__name__}: nobody foresaw" in said
