"""The peak of memory is that of the stretch measured, or unknown."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

OLDER_PEAK = """
import gc, sys, torch
from qwen2_fp16_fix.verification.peak_memory import PeakMemory

assert torch.ones(120 * 2**18).sum() > 0  # 120 MiB, gone again: above 32 MiB glibc always gives pages back
gc.disable()
litter = [torch.ones(100 * 2**18)]
litter.append(litter)
del litter  # 100 MiB that only the collector frees
peak = PeakMemory(torch.device("cpu"))
if peak.before is None:
    sys.exit("this kernel does not lower its high-water mark")
gc.collect()
assert torch.ones(60 * 2**18).sum() > 0
print(peak.bytes())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of the peak")
@pytest.mark.process
def test_neither_an_older_peak_nor_litter_hides_a_newer_one(python: Callable[..., Any]) -> None:
    """In a process of its own: what a test worker frees meanwhile would be taken off the peak."""
    done = python("-c", OLDER_PEAK)
    if "does not lower" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert 50 * 2**20 < int(done.stdout) < 80 * 2**20


def test_a_peak_that_the_kernel_hides_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that ignores the reset, and a system without /proc: None, not a peak of something earlier."""
    from qwen2_fp16_fix.verification import peak_memory

    monkeypatch.setattr(peak_memory, "PROCESS", tmp_path / "proc")
    assert peak_memory.PeakMemory(torch.device("cpu")).bytes() is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "status").write_text("VmHWM:\t  900000 kB\nVmRSS:\t  500000 kB\n")
    assert peak_memory.PeakMemory(torch.device("cpu")).bytes() is None
    (tmp_path / "proc" / "status").write_text("VmHWM:\t  500000 kB\nVmRSS:\t  500000 kB\n")
    peak = peak_memory.PeakMemory(torch.device("cpu"))
    (tmp_path / "proc" / "status").write_text("VmHWM:\t  500100 kB\nVmRSS:\t  500000 kB\n")
    assert peak.bytes() == 100 * 1024
