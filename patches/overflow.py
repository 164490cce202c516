"""Notices that a forward has overflowed, without ever waiting for the device.

Every overflow in a layer makes the last hidden state inf or NaN, and with it its sum. The sums are added up where they
are computed and copied to the host as they come; the host looks at what has arrived whenever it passes by.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Where a copy to pinned memory arrives by itself. On any other device an overflow goes unnoticed here.
ASYNCHRONOUS = ("cuda", "xpu")


class Sums(NamedTuple):
    """A sum in fp32 on its device, the same on the host, and a view of the latter that no dispatcher sees."""

    there: Tensor
    here: Tensor
    seen: Any


class OverflowWatch:
    """Of one Qwen2Model: whether any last hidden state since the last `reset` was not finite."""

    def __init__(self, device: torch.device | None = None) -> None:
        """device: of the final norm, if known. Others are taken up as they come."""
        self.sums: dict[torch.device, Sums] = {}
        self.said = False  # whether the user has been told
        if device is not None:
            self._open(device)

    def note(self, hidden_states: Tensor) -> None:
        """Takes the last hidden state of a forward. Compilers, tracers and function transforms are let through."""
        if type(hidden_states) is not Tensor or _is_traced(hidden_states):
            return
        sums = self.sums.get(hidden_states.device) or self._open(hidden_states.device)
        if sums is not None:
            sums.there.add_(hidden_states.detach().sum(dtype=torch.float32))
            if sums.here is not sums.there:
                sums.here.copy_(sums.there, non_blocking=True)

    def has_overflowed(self) -> bool:
        """Whether one is known to have been not finite. What the device has still to compute is not waited for."""
        return not all(math.isfinite(sums.seen) for sums in tuple(self.sums.values()))

    def reset(self) -> None:
        """Forgets what was, for weights whose plan is new."""
        if self.said or self.has_overflowed():
            devices, self.sums, self.said = list(self.sums), {}, False
            for device in devices:
                self._open(device)

    def _open(self, device: torch.device) -> Sums | None:
        if device.type != "cpu" and device.type not in ASYNCHRONOUS:
            return None
        with torch.inference_mode(False):  # else it could not be added to outside of it
            there = torch.zeros((), dtype=torch.float32, device=device)
            if type(there) is not Tensor:  # shapes alone are computed
                return None
            here = there if device.type == "cpu" else torch.zeros_like(there, device="cpu", pin_memory=True)
            self.sums[device] = Sums(there, here, here.numpy())
        return self.sums[device]

    def __reduce__(self) -> Any:
        """A copy of a model, or one from a file, has run nothing yet."""
        return OverflowWatch, ()


def _is_traced(tensor: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
