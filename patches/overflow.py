"""Notices that a forward has overflowed, without ever waiting for the device.

Every overflow in a layer makes the last hidden state inf or NaN, and so its sum. The device accumulates the sums of
all forwards and copies the total to the host after each. The host reads its copy before each layer's forward.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Devices that copy to pinned memory while the host goes on. On other devices, CPUs aside, overflows go unnoticed.
ASYNCHRONOUS = ("cuda", "xpu")


class Sums(NamedTuple):
    """The total in fp32 on its device, its copy on the host, and a NumPy view of the copy that torch does not trace."""

    there: Tensor
    here: Tensor
    seen: Any


class OverflowWatch:
    """Whether any last hidden state of a Qwen2Model since the last `reset` was not finite."""

    def __init__(self, device: torch.device | None = None) -> None:
        """device: of the final norm, if known. Others are added when a hidden state comes from them."""
        self.sums: dict[torch.device, Sums] = {}
        self.said = False  # whether the user has been warned
        if device is not None:
            self._open(device)

    def note(self, hidden_states: Tensor) -> None:
        """Adds the last hidden state of a forward, unless a compiler, a tracer or a function transform runs it."""
        if type(hidden_states) is not Tensor or _is_traced(hidden_states):
            return
        sums = self.sums.get(hidden_states.device) or self._open(hidden_states.device)
        if sums is not None:
            sums.there.add_(hidden_states.detach().sum(dtype=torch.float32))
            if sums.here is not sums.there:
                sums.here.copy_(sums.there, non_blocking=True)

    def has_overflowed(self) -> bool:
        """Whether a hidden state is known not to be finite. It does not wait for forwards that are still running."""
        return not all(math.isfinite(sums.seen) for sums in tuple(self.sums.values()))

    def reset(self) -> None:
        """Starts again, with a new plan."""
        if self.said or self.has_overflowed():
            devices, self.sums, self.said = list(self.sums), {}, False
            for device in devices:
                self._open(device)

    def _open(self, device: torch.device) -> Sums | None:
        if device.type != "cpu" and device.type not in ASYNCHRONOUS:
            return None
        with torch.inference_mode(False):  # a tensor made in inference mode could not be added to outside of it
            there = torch.zeros((), dtype=torch.float32, device=device)
            if type(there) is not Tensor:  # a FakeTensor: only shapes are computed
                return None
            here = there if device.type == "cpu" else torch.zeros_like(there, device="cpu", pin_memory=True)
            self.sums[device] = Sums(there, here, here.numpy())
        return self.sums[device]

    def __reduce__(self) -> Any:
        """A copied or unpickled watch is new: its model has not run yet."""
        return OverflowWatch, ()


def _is_traced(tensor: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
