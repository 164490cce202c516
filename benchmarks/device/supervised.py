"""A proof in a process of its own, and its rest in another one where the device, or the process, is lost."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import report
from .prove import say

DEVICE_LOST = 75  # the exit code of a process that can do no more on its device; any other than 0 and 1 is a crash
ROOT = Path(__file__).parents[2]


def supervised(
    device: str, budget: float, sections: Sequence[str], path: Path, start: Callable[[list[str]], int] | None = None
) -> dict[str, Any]:
    """What `prove` finds, run in as many processes as it takes. Every one begins one section at least.

    start: runs the options of `python -m benchmarks gpu` and returns the exit code.
    """
    path.unlink(missing_ok=True)
    end, rest = time.monotonic() + budget, list(sections)
    found: dict[str, Any] = {"begun": [], "broken": []}
    while rest:
        options = ["--device", device, "--budget", f"{max(1.0, end - time.monotonic()):.0f}", "--out", str(path)]
        options += ["--in-process", *(["--resume"] if path.exists() else [])]
        code = (start or run)([*options, *(word for name in rest for word in ("--only", name))])
        begun_before = found["begun"]
        found = json.loads(path.read_text("utf-8")) if path.exists() else found
        if code in (0, 1):
            return found
        if found["begun"] == begun_before:
            raise RuntimeError(f"the proof ended in {ending(code)} before any section began: see what it said above.")
        if code != DEVICE_LOST:
            found["broken"].append(f"The section {found['begun'][-1]} ended its process in {ending(code)}.")
            report.write(path, found)
            say(f"  {found['broken'][-1]}")
        rest = [name for name in rest if name not in found["begun"]]
        if rest:
            say("the rest runs in a new process")
    return found


def run(options: list[str]) -> int:
    """In a process like this one."""
    command = [sys.executable, "-m", "benchmarks", "gpu", *options]
    return subprocess.run(command, check=False).returncode


def ending(code: int) -> str:
    """How a process has ended, in words."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
