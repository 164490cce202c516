"""An export that ends early leaves nothing, or a whole folder."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qwen2_fp16_fix
from qwen2_fp16_fix.demo import CHECKPOINT
from qwen2_fp16_fix.errors import ExportError
from qwen2_fp16_fix.files import folders
from qwen2_fp16_fix.hub import export
from tests.hub.examples import contents


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_an_interruption_leave_nothing(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, calls = shutil.copyfile, []

    def some(source: Path, target: Path) -> None:
        calls.append(target)
        copy(source, target)
        if len(calls) == 7:
            target.write_bytes(target.read_bytes()[:100])
            raise failure

    monkeypatch.setattr(export.shutil, "copyfile", some)
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else ExportError) as raised:
        qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out", weights="copy")
    assert len(calls) == 7
    assert isinstance(raised.value, KeyboardInterrupt) or "the disk is full" in str(raised.value)
    assert not list(tmp_path.iterdir())


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import qwen2_fp16_fix
source, folder, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
chance, found = random.Random(seed), []

def export(name, last_event=None):
    pid = os.fork()
    if pid == 0:
        if last_event is not None:
            left = [last_event]
            def count(event, arguments):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(count)
        qwen2_fp16_fix.export(source, folder / name, weights="copy")
        os._exit(0)
    return pid

qwen2_fp16_fix.export(source, folder / "first", weights="copy")  # imports what it needs
events = []
sys.addaudithook(lambda event, arguments: events.append(event))
started = time.monotonic()
qwen2_fp16_fix.export(source, folder / "whole", weights="copy")
seconds, events = time.monotonic() - started, list(events)
rename = events.index("os.rename") + 1
points = [("event", n) for n in (rename, rename + 1, *(chance.randrange(1, len(events)) for _ in range(5)))]
points += [("seconds", seconds * (n + chance.random()) / 5) for n in range(5)]
for number, (kind, when) in enumerate(points):
    pid = export(f"out{number}", when if kind == "event" else None)
    if kind == "seconds":
        time.sleep(when)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    found.append((kind, when, os.waitstatus_to_exitcode(status), (folder / f"out{number}").exists()))
print(json.dumps(found))
"""


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_kill_leaves_nothing_or_a_whole_folder(
    tmp_path: Path, python: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Five times at a random moment, five times at a random system call, and on either side of the rename."""
    seed = int.from_bytes(os.urandom(2), "big")
    done = python("-c", KILLED, str(CHECKPOINT), str(tmp_path), str(seed), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    whole = contents(tmp_path / "whole")
    assert {code for kind, _, code, _ in found if kind == "event"} == {-9}, f"seed {seed}: {found}"
    assert {kind for kind, *_, there in found if not there} == {"event", "seconds"}, f"seed {seed}: {found}"
    assert not found[0][3], "the rename was next"
    for number, (*_, there) in enumerate(found):
        if there:
            assert contents(tmp_path / f"out{number}") == whole, f"seed {seed}: {found[number]}"
        else:
            qwen2_fp16_fix.export(CHECKPOINT, tmp_path / f"out{number}", weights="copy")
    assert not [path for path in tmp_path.iterdir() if "exporting" in path.name]
    assert "an interrupted export had left" in caplog.text


def test_only_leftovers_of_ended_exports_are_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The temporary folder of an export that still runs, here or on another machine, must not be taken from it."""
    prefix = f".out.exporting-{folders.HOST}-"
    done = 2**22 + 1  # past the largest number of a process
    dead, alive, other = f"{prefix}{done}-abc", f"{prefix}{os.getppid()}-abc", ".out.exporting-elsewhere-1-abc"
    for name in (dead, alive, other):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    with caplog.at_level(logging.WARNING):
        qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {alive, other, "out"}
    assert all(name in caplog.text for name in (dead, alive, other))
