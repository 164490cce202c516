"""The most memory that a part of a run took."""

import gc
import re
from pathlib import Path

import torch

PROCESS = Path("/proc/self")
TOLERANCE = 8 * 2**20  # the kernel counts resident pages in batches for each thread


class PeakMemory:
    """The peak since it was made: on a GPU torch's own, on a CPU under Linux the rise of resident memory."""

    def __init__(self, device: torch.device) -> None:
        """Starts to watch, after a collection: memory that is freed later would lower the peak."""
        gc.collect()
        self.device = device
        self.before: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self.before = self._lower_the_mark()

    def _lower_the_mark(self) -> int | None:
        """Lowers the kernel's high-water mark to the resident bytes and returns them. None if it cannot.

        Writing 5 to clear_refs resets VmHWM (proc(5)). An older peak would otherwise hide this one.
        """
        try:
            (PROCESS / "clear_refs").write_text("5")
        except OSError:
            return None
        before, mark = resident("VmRSS"), resident("VmHWM")
        return before if before is not None and mark is not None and mark - before < TOLERANCE else None

    def bytes(self) -> int | None:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        mark = resident("VmHWM")
        return None if self.before is None or mark is None else max(0, mark - self.before)


def resident(field: str) -> int | None:
    """VmRSS or VmHWM of this process in bytes, from Linux's own account; None elsewhere."""
    try:
        found = re.search(rf"^{field}:\s*(\d+) kB$", (PROCESS / "status").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
