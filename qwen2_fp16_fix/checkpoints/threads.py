"""How many threads torch computes with while a checkpoint is examined.

torch takes a thread for each core of the machine. Where a container or other programs leave fewer cores, these threads
wait for each other in loops that take CPU time: the demo took 43 s of it in place of 8.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch

#: Variables with which a user decides how many threads there are.
CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
MEMBERSHIP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@contextmanager
def one_thread() -> Iterator[None]:
    """For a block that computes with tiny models: they gain nothing from a second thread."""
    with _at_most(1):
        yield


@contextmanager
def own_cores() -> Iterator[None]:
    """For a block that computes with real models: a thread for each core that this process may use.

    A number that the user chose stays: OMP_NUM_THREADS, MKL_NUM_THREADS, or a lower `torch.set_num_threads`.
    """
    with _at_most(torch.get_num_threads() if any(map(os.environ.get, CHOSEN_BY)) else usable_cores()):
        yield


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """torch's number of threads is the caller's again at the end."""
    before = torch.get_num_threads()
    if count < before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count < before:
            torch.set_num_threads(before)


def usable_cores() -> int:
    """The cores that this process may run on, and no more than its share of CPU time, rounded up. At least 1."""
    # os.process_cpu_count, of Python 3.13, knows the mask as well, but no share.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(-int(-share // 1) for share in _shares())]))


def _shares() -> Iterator[float]:
    """The cores' worth of CPU time that each control group around this process gives it. Linux has both versions."""
    for line in _read(MEMBERSHIP).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, files = GROUPS, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            root, files = GROUPS / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        for group in _around(path):
            quota, *period = " ".join(_read(root / group / name) for name in files).split() or ["max"]
            if period and quota.isdecimal() and int(period[0]):  # "max" and -1: no limit
                yield int(quota) / int(period[0])


def _around(path: str) -> Iterator[PurePosixPath]:
    """A control group and those around it, relative to the root. Inside a container the path may be the host's."""
    group = PurePosixPath(path.lstrip("/"))
    yield group
    yield from group.parents


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
