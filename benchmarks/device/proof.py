"""A proof of several sections: what each found, what is kept in one JSON file, and what a surprise may cost.

- A section has a share of the seconds that are left. What it has no time for, it says (`over`).
- An exception costs the row it happens in (`row`), or else the rest of its section. Both are kept with their traceback.
- A section that hangs is stopped by an alarm, and the next one runs.
- After a CUDA error nothing works on the device until the process ends, and some end it. Another one goes on then
  (supervised.py). The file says which sections have begun.
"""

import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import report
from .sizes import Sizes

Section = Callable[["Proof"], None]
SAVE_EVERY = 5.0  # seconds: what a machine that is taken away may cost
GRACE = 15.0  # seconds that a section may pass its share by: one row takes as long as it takes
LAST_LINES = 6  # of a traceback


class NotAvailable(RuntimeError):
    """The device or this torch has no such kernel. It is no broken promise."""


class TooLong(BaseException):
    """The alarm of a section. No `except Exception` takes it for the failure of a row."""


@dataclass
class Proof:
    """What the sections share, and what they found."""

    device: torch.device
    sizes: Sizes
    path: Path
    budget: float
    environment: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)  # promises, a sentence each
    left_out: list[str] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)  # sections
    seconds: dict[str, float] = field(default_factory=dict)  # that each section took
    lost: bool = False  # whether the device answers no more
    until: float = float("inf")  # when the section that runs is over
    tried: bool = True  # whether the section that runs has tried a row
    saved_at: float = 0.0

    def run(self, sections: dict[str, tuple[Section, float]], say: Callable[[str], None] = print) -> None:
        """Runs them in turn, by name with their shares, until all are through or the device is lost."""
        end, names = time.monotonic() + self.budget, list(sections)
        for at, name in enumerate(names):
            weights = [sections[each][1] for each in names[at:]]
            share = max(0.0, end - time.monotonic()) * weights[0] / sum(weights)
            failures = len(self.broken)
            self.run_section(name, sections[name][0], share)
            say(f"{name}: {self.seconds[name]:.1f} s")
            for sentence in self.broken[failures:]:
                say(f"  {sentence}")
            if len(self.broken) > failures and not self.is_usable():
                self.lost = True
                return

    def run_section(self, name: str, section: Section, share: float) -> None:
        """Runs one for `share` seconds and a grace, whatever happens in it, and writes the file."""
        started = time.monotonic()
        self.until, self.tried = started + share, False
        self.begun.append(name)
        self.save()
        try:
            with alarm(share + GRACE):
                section(self)
        except TooLong:
            self.left_out.append(f"{name}: the rest, stopped by its alarm")
        except Exception as error:
            self.rows.setdefault("crashes", []).append({"section": name, "traceback": last_lines(error)})
            self.broken.append(f"The section {name} ended in {first_line(error)}")
        self.seconds[name] = round(time.monotonic() - started, 1)
        free_memory(self.device)
        self.save()

    @contextmanager
    def row(self, section: str, **case: Any) -> Iterator[dict[str, Any]]:
        """A row of the section, which is kept whatever happens to it: NotAvailable is a finding, the rest a failure."""
        found, self.tried = dict(case), True
        try:
            yield found
        except NotAvailable as error:
            found["not_available"] = str(error)
        except Exception as error:
            found["failed"] = last_lines(error)
            self.broken.append(f"{section}, {described(case)}: it ended in {first_line(error)}")
            free_memory(self.device)
        finally:
            self.rows.setdefault(section, []).append(found)
            if time.monotonic() - self.saved_at > SAVE_EVERY:
                self.save()

    def promise(self, kept: bool, sentence: str) -> None:
        """Notes the sentence if what it says the contrary of does not hold."""
        if not kept:
            self.broken.append(sentence)

    def over(self, case: str) -> bool:
        """Whether the section's time is up; then the case is noted as left out. Its first row is always tried."""
        if not self.tried or time.monotonic() <= self.until:
            return False
        self.left_out.append(case)
        return True

    def left(self) -> float:
        """Seconds until the section is over."""
        return max(0.0, self.until - time.monotonic())

    def is_usable(self) -> bool:
        """Whether the device still computes."""
        try:
            return bool(torch.ones(2, device=self.device).sum().item() == 2)
        except Exception:
            return False

    def found(self) -> dict[str, Any]:
        """All of it, fit for JSON."""
        names = ("environment", "begun", "seconds", "rows", "left_out", "broken")
        return {"proof": "device", **{name: getattr(self, name) for name in names}}

    def take_up(self, found: dict[str, Any]) -> None:
        """Goes on from what another process has written."""
        for name in ("begun", "seconds", "rows", "left_out", "broken"):
            setattr(self, name, found[name])

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        report.write(self.path, self.found())
        self.saved_at = time.monotonic()


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises TooLong in the block after so many seconds, and again each 5, as a destructor would swallow it.

    Only in the main thread of a system that has such alarms.
    """
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(run: Callable[[], Any]) -> tuple[Any, str | None]:
    """What it returns and None, or None and why not."""
    try:
        return run(), None
    except Exception as error:
        return None, first_line(error)


def first_line(error: BaseException) -> str:
    """The kind of an exception and the first line that it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def last_lines(error: BaseException) -> list[str]:
    """The end of a traceback: where it happened, and what it says."""
    text = "".join(traceback.format_exception(error)).replace(str(report.RESULTS.parents[1]), "").strip()
    return [line[:240] for line in text.splitlines()[-LAST_LINES:]]


def described(case: dict[str, Any]) -> str:
    """A case in words, for a sentence."""
    return " ".join(f"{value:,}" if type(value) is int else str(value) for value in case.values())


def free_memory(device: torch.device) -> None:
    """Gives cached memory back, where that is possible."""
    if device.type == "cuda":
        attempt(torch.cuda.empty_cache)


def wait_for(device: torch.device) -> None:
    """Until the device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
