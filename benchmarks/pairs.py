"""Times two ways of doing the same against each other: in pairs, in turns, so that a busy machine slows both."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

Run = Callable[[], Any]
SHORTEST = 0.01  # seconds that one measurement should last at least: below, the clock and the scheduler are heard
SLOW = 0.5  # seconds of a run that need not be repeated to be warm


@dataclass(frozen=True)
class Ratio:
    """Seconds of one run on either side, and the quartiles over pairs of right / left."""

    left: float
    right: float
    median: float
    lower: float
    upper: float
    pairs: int

    def as_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        return asdict(self)


@torch.no_grad()
def compare(left: Run, right: Run, device: torch.device, budget: float, least: int = 3, most: int = 200) -> Ratio:
    """Pairs in the order A B, B A, A B, …, after a warm-up, until `budget` seconds and `least` pairs are through."""
    repeats = [warm_up(run, device) for run in (left, right)]
    times: list[tuple[float, float]] = []
    started = time.monotonic()
    while len(times) < least or (time.monotonic() - started < budget and len(times) < most):
        order = ((0, left), (1, right))
        taken = {side: seconds(run, repeats[side], device) for side, run in (order if len(times) % 2 else order[::-1])}
        times.append((taken[0], taken[1]))
    lower, median, upper = statistics.quantiles((b / a for a, b in times), n=4, method="inclusive")
    middle = [statistics.median(side) for side in zip(*times, strict=True)]
    return Ratio(middle[0], middle[1], median, lower, upper, len(times))


def warm_up(run: Run, device: torch.device) -> int:
    """Runs once, or a few times if that is quick, and says how many runs make one measurement."""
    first = seconds(run, 1, device)
    return 1 if first > SLOW else max(1, round(SHORTEST / seconds(run, 3, device)))


def seconds(run: Run, repeats: int, device: torch.device) -> float:
    """Seconds of one run, on the device's own clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - started) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / repeats
