"""In which dtype the next matmul runs: the dtype of its input, or the one that autocast casts it to."""

import functools

import torch
from torch import Tensor

from .symbolic import is_symbolic, refuse


def autocast_device(device_type: str) -> str:
    """`device_type` if autocast knows it, else "cpu": autocast raises if it is asked about the meta device.

    Before torch 2.13 the compiler cannot trace this check, so compiled code skips it: it runs on a device that autocast
    knows, unless the model has no weights. Every fixed part calls this function first, so a trace of torch.fx into a
    part is refused here.
    """
    if torch.compiler.is_compiling():
        return "cpu" if device_type == "meta" else device_type
    return _autocast_device(device_type)


@functools.lru_cache
def _autocast_device(device_type: str) -> str:
    if is_symbolic(device_type):
        refuse()
    return device_type if torch.amp.is_autocast_available(device_type) else "cpu"


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is active for tensors on `device_type`."""
    return torch.is_autocast_enabled(autocast_device(device_type))


def is_full_precision(hidden_states: Tensor) -> bool:
    """Whether matmuls on this activation run in fp32 or wider, so that stock arithmetic is already safe.

    fp32 activations under autocast do not count: autocast casts the operands of each matmul back to 16 bit.
    """
    return hidden_states.dtype in (torch.float32, torch.float64) and not autocast_is_on(hidden_states.device.type)


def runs_in_float16(activation: Tensor) -> bool:
    """Whether the next matmul on this activation returns float16, by its own dtype or by autocast's."""
    device = autocast_device(activation.device.type)
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == torch.float16
    return activation.dtype == torch.float16
