"""Runs inputs in forks of this process, which has imported torch once, each fork with limits of time and memory."""

import contextlib
import gc
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen2_fp16_fix.cli import main
from qwen2_fp16_fix.verification import rows

SECONDS = 25  # that one input may take
MEMORY = 2 * 2**30  # bytes that the process may hold at its peak
SHARE = 100  # inputs that one fork runs
NEW_TOKENS = 2  # that `verify` generates in each row; its own 32 would take most of the time here
LONGEST = 1500  # letters of a sentence
GRACE = 275  # seconds more after which a fork that its own alarm did not stop is killed
LOGGED = re.compile(r"^\[transformers\].*?(?=^(?:qwen2-fp16-fix: |\[transformers\]))", re.MULTILINE | re.DOTALL)
GOOD, REFUSALS, CRASH = (0, 1), (2, 3), 70


class Hang(BaseException):
    """An input has taken longer than SECONDS. No `except Exception` may catch it."""


@dataclass
class Trial:
    """One input: its random numbers, an empty folder, what it has run and what went wrong."""

    kind: str
    number: int
    folder: Path
    faults: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # counted in the report: "proven", "refused"

    def __post_init__(self) -> None:
        """Seeds by a text: Python derives the same numbers from it in every release."""
        self.random = random.Random(f"{self.kind} {self.number}")

    def fault(self, what: str, details: str = "") -> None:
        """Notes that something went wrong. what: the same for every input with the same cause."""
        self.faults.append(f"{what}\n{details}".strip())

    def run(self, *arguments: str | Path) -> tuple[int, str]:
        """Runs a command in this process as a shell would, and checks how it ends. Returns exit code and stdout."""
        words = [str(each) for each in arguments]
        self.commands.append(" ".join(words))
        code, out, err = call(*words)
        for what in complaints(code, err):
            self.fault(f"{words[0]}: {what}", f"{self.commands[-1]}\n{err[-3000:]}")
        self.notes.append(f"{words[0]} {code}")
        return code, out


Attempt = Callable[[Trial], None]


def complaints(code: int, err: str) -> Iterator[str]:
    """What is wrong with how a command has ended."""
    if "Traceback (most recent call last)" in err or code == CRASH:
        yield f"exit code {code}, {cause_of(err)}"
    elif code not in (*GOOD, *REFUSALS):
        yield f"exit code {code}"
    elif "not enough memory" in err:
        yield "more memory than the limit"
    elif code in REFUSALS:
        yield from _complaints_of_sentence(err)


def _complaints_of_sentence(err: str) -> Iterator[str]:
    """What is wrong with what a refusal has written to stderr: its progress, what transformers logs, and a sentence.

    Progress is a bar, or a line that ends with "…".
    """
    err = LOGGED.sub("", err)
    *before, last = err.strip("\n").split("\n")
    if not last.startswith("qwen2-fp16-fix: "):
        yield f"no sentence at the end of stderr: {last[:60]}"
    elif len(last) > LONGEST:
        yield f"a sentence of more than {LONGEST} letters: {last[:80]}"
    elif not last.endswith((".", "`")):
        yield f"no whole sentence: {last[:80]}"
    for line in before:
        if line.strip() and not line.rstrip().endswith("…") and "━" not in line:
            yield f"more than a sentence on stderr: {line[:60]}"
            break


def cause_of(err: str) -> str:
    """The exception and the innermost line of ours that a traceback names."""
    places = re.findall(r'File "[^"]*?((?:qwen2_fp16_fix|patches|transformers)/[^"]*)", line (\d+), in (\S+)', err)
    own = [place for place in places if not place[0].startswith("transformers/")] or places or [("?", "0", "?")]
    last = (err.strip().splitlines() or ["?"])[-1]
    return f"{last.split(':')[0][:80]} in {own[-1][0]} {own[-1][2]}"


def call(*arguments: str) -> tuple[int, str, str]:
    """`qwen2-fp16-fix` from `main` on: exit code, stdout and stderr, with what C code and loggers write to them."""
    kept = sys.argv, sys.stdout, sys.stderr, rows.NEW_TOKENS
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, _redirected(1, out), _redirected(2, err):
        sys.argv, rows.NEW_TOKENS = ["qwen2-fp16-fix", *arguments], NEW_TOKENS
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        try:
            main.main()
            code: Any = 0
        except SystemExit as end:
            code = end.code
        except Exception:  # what main.main() itself lets through
            traceback.print_exc()
            code = CRASH
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            sys.argv, sys.stdout, sys.stderr, rows.NEW_TOKENS = kept
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "backslashreplace"))
    return (code if isinstance(code, int) else int(code is not None)), texts[0], texts[1]


@contextlib.contextmanager
def _redirected(descriptor: int, file: Any) -> Iterator[None]:
    kept = os.dup(descriptor)
    os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)


def attempt(kind: str, number: int, make: Attempt) -> dict[str, Any]:
    """Runs one input in this process and says how it went, as plain data."""
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="qwen2-fp16-fix-fuzz-"))
    trial = Trial(kind, number, folder)
    _forget_peak()
    _set_alarm(SECONDS)
    try:
        make(trial)
    except Hang:
        trial.fault(f"more than {SECONDS} s, {cause_of(traceback.format_exc())}", traceback.format_exc()[-3000:])
    except Exception:
        trial.fault(f"the fuzz itself: {cause_of(traceback.format_exc())}", traceback.format_exc()[-3000:])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        shutil.rmtree(folder, ignore_errors=True)
    if (peak := _peak()) > MEMORY:
        trial.fault("more than 2 GB", f"{peak} bytes\n" + "\n".join(trial.commands))
    found = {"number": number, "faults": trial.faults, "commands": trial.commands, "notes": trial.notes}
    return found | {"peak": peak, "seconds": round(time.monotonic() - started, 3)}


def _set_alarm(seconds: float) -> None:
    """Raises Hang in this many seconds. The time for which this process waits for a core does not count."""
    ends = time.monotonic() + seconds - _queued()

    def ring(*_: Any) -> None:
        left = ends + _queued() - time.monotonic()
        if left <= 0.01:
            raise Hang
        signal.setitimer(signal.ITIMER_REAL, left)

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _queued() -> float:
    """Seconds for which this process could have run but for others on its cores."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


def _status(name: str) -> int:
    """A size of this process in bytes, from what Linux says about it."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024  # type: ignore[index]


def _peak() -> int:
    return _status("VmHWM")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def limit_memory() -> None:
    """Lets this process ask for MEMORY more than it has now: one that asks for all memory must not get it."""
    limit = _status("VmSize") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def run(kind: str, numbers: Sequence[int], make: Attempt) -> Iterator[dict[str, Any]]:
    """How each input went. A fork that dies is followed by another that goes on behind the input that killed it."""
    gc.collect()
    gc.freeze()  # `verify` collects after each row, which would walk through torch each time
    left = list(numbers)
    while left:
        share = left[:SHARE]
        for found in _fork(kind, share, make):
            yield found
            left.remove(found["number"])
            share.remove(found["number"])


def _fork(kind: str, numbers: Sequence[int], make: Attempt) -> Iterator[dict[str, Any]]:
    """What one fork says of the inputs, and of the one that it died of."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, where there are threads: idle ones
        child = os.fork()
    if child == 0:
        _work(kind, numbers, make, writing)
    os.close(writing)
    waiting = list(numbers)
    with os.fdopen(reading, "rb") as answers:
        for line in _lines(answers):
            found = json.loads(line)
            waiting.remove(found["number"])
            yield found
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if waiting:
        what = f"no answer within {SECONDS} s, or the process died ({ended})"
        yield {"number": waiting[0], "faults": [what], "commands": [], "notes": [], "peak": 0, "seconds": SECONDS}


def _lines(answers: Any) -> Iterator[bytes]:
    """The lines of a pipe until it ends, or until none comes for longer than an input may take."""
    held = b""
    while select.select([answers], [], [], SECONDS + GRACE)[0]:
        block = os.read(answers.fileno(), 2**16)
        if not block:
            return
        *whole, held = (held + block).split(b"\n")
        yield from whole


def _work(kind: str, numbers: Sequence[int], make: Attempt, answers: int) -> None:
    """The fork: runs the inputs, writes a line for each, and ends without coming back."""
    code = 1
    try:
        limit_memory()
        for number in numbers:
            text = json.dumps(attempt(kind, number, make)) + "\n"
            data = memoryview(text.encode())
            while data:
                data = data[os.write(answers, data) :]
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
