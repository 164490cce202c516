"""`python -m tests.fuzz`: runs what the package's docstring lists, and prints each fault once, with its numbers."""

import argparse
import collections
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
_CACHE = tempfile.TemporaryDirectory(prefix="qwen2-fp16-fix-fuzz-cache-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = os.environ["HF_MODULES_CACHE"] = _CACHE.name
os.environ.pop("QWEN2_FP16_FIX", None)

SHOWN = 8  # numbers of inputs that one cause is shown with


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Exit code 1: something went wrong with an input."""
    from tests.fuzz import kinds

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Run damaged inputs.")
    parser.add_argument("kind", nargs="?", choices=[*kinds.KINDS, "all"], default="all")
    parser.add_argument("start", nargs="?", type=int, help="the first number, or the only one")
    parser.add_argument("end", nargs="?", type=int, help="the number after the last one")
    options = parser.parse_args(arguments)
    if options.kind != "all" and options.start is not None and options.end is None:
        return one(options.kind, options.start)
    chosen = kinds.KINDS if options.kind == "all" else [options.kind]
    wrong = 0
    for kind in chosen:
        start = options.start or 0
        wrong += many(kind, range(start, options.end or kinds.count(kind)))
    return 1 if wrong else 0


def one(kind: str, number: int) -> int:
    """Runs one input in this process and prints all of it."""
    from tests.fuzz import kinds, worker

    found = worker.attempt(kind, number, kinds.attempt(kind))
    print(*found["commands"], *found["notes"], sep="\n")
    for fault in found["faults"]:
        print(f"\nFAULT {fault}")
    print(f"\n{kind} {number}: {len(found['faults'])} faults, {found['seconds']} s, {found['peak'] / 2**20:.0f} MB")
    return 1 if found["faults"] else 0


def many(kind: str, numbers: Sequence[int]) -> int:
    """Runs inputs in forks and prints the causes of their faults. Returns how many inputs had one."""
    from tests.fuzz import kinds, worker

    started = time.monotonic()
    causes: dict[str, list[int]] = collections.defaultdict(list)
    notes: collections.Counter[str] = collections.Counter()
    slowest: dict[str, Any] = {"seconds": 0.0, "number": None}
    peak, wrong, done = 0, 0, 0
    kinds.prepare(kind, numbers)
    for found in interruptible(worker.run(kind, numbers, kinds.attempt(kind))):
        done += 1
        wrong += bool(found["faults"])
        notes.update(found["notes"])
        peak = max(peak, found["peak"])
        slowest = max(slowest, found, key=lambda each: each["seconds"])
        for fault in dict.fromkeys(fault.splitlines()[0] for fault in found["faults"]):
            causes[fault].append(found["number"])
            if len(causes[fault]) == 1:
                print(f"{kind} {found['number']}: {fault}", flush=True)
        if done % 100 == 0:
            print(f"{kind}: {done} of {len(numbers)}, {time.monotonic() - started:.0f} s", flush=True)
    print(
        f"\n{kind}: {done} inputs, {wrong} with faults, {time.monotonic() - started:.0f} s; peak {peak / 2**20:.0f} MB;"
    )
    print(f"  slowest {slowest['seconds']:.1f} s ({kind} {slowest['number']})")
    print("  " + ", ".join(f"{count} {note}" for note, count in sorted(notes.items())))
    for cause, where in sorted(causes.items(), key=lambda item: -len(item[1])):
        print(f"  {len(where):5}  {cause}  [{', '.join(map(str, where[:SHOWN]))}]")
    return wrong


def interruptible(found: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same, until Ctrl-C, after which what was found is still printed."""
    with contextlib.suppress(KeyboardInterrupt):
        yield from found


if __name__ == "__main__":
    sys.exit(main())
