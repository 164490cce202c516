"""A file that is written is the old one or the whole new one, whatever fails and whoever else writes to it."""

import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen2_fp16_fix.errors import ScanError
from qwen2_fp16_fix.files import folders
from qwen2_fp16_fix.files.writing import check_writable, write_whole

OLD, NEW = "old" * 1000, "new" * 5000
posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such files")


def write(path: Path, text: str = NEW) -> None:
    write_whole(path, lambda part: part.write_text(text), "another file", ScanError)


CALLS = ("open", "close", "fsync", "replace", "rename", "unlink", "chmod", "stat", "lstat", "mkdir", "rmdir")


class Faults:
    """Stands for the system: the call with the number `at` fails, all of them counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int, after: bool) -> None:
        self.error, self.at, self.after, self.calls = error, at, after, list[str]()
        for owner, name in (
            *((os, name) for name in CALLS),
            *((Path, name) for name in ("write_text", "replace", "rename", "unlink", "chmod", "stat", "mkdir")),
        ):
            monkeypatch.setattr(owner, name, self.failing(getattr(owner, name), name))

    def failing(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            self.calls.append(name)
            mine = len(self.calls) - 1 == self.at
            if mine and not self.after:
                raise self.error
            found = call(*arguments, **named)
            if mine and name not in ("open", "close"):  # what is open would stay open: the test's own fault
                raise self.error
            return found

        return run


def faults() -> list[BaseException]:
    return [OSError(errno.ENOSPC, "full"), PermissionError(errno.EACCES, "refused"), KeyboardInterrupt()]


@posix
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("fault", faults(), ids=lambda fault: getattr(fault, "strerror", None) or type(fault).__name__)
def test_a_fault_of_any_call_leaves_the_old_content_or_the_new(
    fault: BaseException, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call of the system fails once, before it has done anything and after: a full disk, no rights, Ctrl-C."""
    path, number, ended = tmp_path / "file", 0, False
    while not ended:
        for after in (False, True):
            path.write_text(OLD) if there else path.unlink(missing_ok=True)
            raised: BaseException | None = None
            with monkeypatch.context() as patch:
                made = Faults(patch, fault, number, after)
                try:
                    write(path)
                except BaseException as error:
                    raised = error
            content = path.read_text() if path.exists() else None
            assert content in (NEW, OLD if there else None), made.calls
            assert content == NEW or raised is not None, made.calls
            assert raised is None or isinstance(raised, ScanError if isinstance(fault, OSError) else type(fault))
            left = [each.name for each in tmp_path.iterdir() if each != path]
            assert not left or made.calls[number] in ("unlink", "close"), (left, made.calls)
            for each in left:
                (tmp_path / each).unlink()
            ended = number >= len(made.calls)
        number += 1
    assert number > 8


def test_writers_at_once_leave_one_of_their_contents(tmp_path: Path) -> None:
    """Two threads, or two containers whose processes have the same number, wrote to one part file."""
    path, contents = tmp_path / "file", [str(n) * 20000 for n in range(4)]
    errors: list[BaseException] = []

    def run(text: str) -> None:
        try:
            for _ in range(5):
                write(path, text)
                assert path.read_text() in contents
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(text,)) for text in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert path.read_text() in contents
    assert os.listdir(tmp_path) == ["file"]


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/null")


def loop(path: Path) -> None:
    path.symlink_to(path)


@posix
@pytest.mark.parametrize(
    ("make", "words"),
    [(pipe, "a pipe"), (device, "a device"), (Path.mkdir, "a folder"), (loop, "symbolic links")],
    ids=["pipe", "device", "folder", "loop"],
)
@pytest.mark.parametrize("call", [write, lambda path: check_writable(path, "another file", ScanError)])
def test_what_is_no_file_is_left_alone(
    call: Callable[[Path], object], make: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    """`lock -o /dev/null --force` as root made /dev/null a file, and broke the machine."""
    make(tmp_path / "out")
    before = (tmp_path / "out").lstat()
    with pytest.raises(ScanError, match=words):
        call(tmp_path / "out")
    assert (tmp_path / "out").lstat() == before
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(ScanError, match="a folder"):
        call(Path("/"))


@posix
def test_a_link_stays_and_its_file_is_written(tmp_path: Path) -> None:
    """It became a file, and what it led to kept its old content."""
    (tmp_path / "there").mkdir()
    for name in ("there/file", "there/new"):
        link = tmp_path / f"to {Path(name).name}"
        link.symlink_to(tmp_path / name)
    (tmp_path / "there" / "file").write_text(OLD)
    for link in tmp_path.glob("to *"):
        write(link)
        assert link.is_symlink()
    assert {path.name: path.read_text() for path in (tmp_path / "there").iterdir()} == {"file": NEW, "new": NEW}


@posix
def test_a_file_keeps_its_rights(tmp_path: Path) -> None:
    """A file for its owner alone could be read by everyone once it was written anew."""
    path = tmp_path / "file"
    for mode in (0o600, 0o664, 0o444):
        path.unlink(missing_ok=True)
        path.write_text(OLD)
        path.chmod(mode)
        write(path)
        assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == (NEW, mode)
    assert check_writable(path, "another file", ScanError) == path
    assert os.listdir(tmp_path) == ["file"]


@posix
@pytest.mark.parametrize("fault", faults(), ids=lambda fault: getattr(fault, "strerror", None) or type(fault).__name__)
def test_a_fault_of_any_call_leaves_no_folder_or_the_whole_one(
    fault: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a file: an export, or the demo's checkpoint."""
    out, number, ended = tmp_path / "out", 0, False
    while not ended:
        for after in (False, True):
            raised: BaseException | None = None
            with monkeypatch.context() as patch:
                made = Faults(patch, fault, number, after)
                try:
                    with folders.whole_folder(out, ScanError) as written:
                        for name in ("a", "b"):
                            (written / name).write_text(NEW)
                except BaseException as error:
                    raised = error
            ended = number >= len(made.calls)
            failed = "" if ended else made.calls[number]
            whole = out.exists() and [(out / name).read_text() for name in ("a", "b")] == [NEW, NEW]
            assert whole or (raised is not None and not out.exists()), made.calls
            assert raised is None or isinstance(raised, ScanError if isinstance(fault, OSError) else type(fault))
            left = [each for each in tmp_path.iterdir() if each != out]
            assert not left or failed in ("unlink", "rmdir", "close", "lstat", "open", "mkdir"), (left, made.calls)
            for each in tmp_path.iterdir():
                shutil.rmtree(each)
        number += 1
    assert number > 15


def test_a_folder_of_another_container_that_runs_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Containers may share a host's name and not see each other's processes."""
    monkeypatch.setattr(folders, "_is_running", lambda process: False)
    with folders.whole_folder(tmp_path / "out", ScanError) as first:
        (first / "file").write_text(NEW)
        with folders.whole_folder(tmp_path / "out" / ".." / "out", ScanError) as second:
            assert first.is_dir() or os.name == "nt"
            (second / "file").write_text(OLD)
        (tmp_path / "out" / "file").unlink()  # an empty folder may be replaced
    assert (tmp_path / "out" / "file").read_text() == NEW
    assert "belongs to another export" in caplog.text
