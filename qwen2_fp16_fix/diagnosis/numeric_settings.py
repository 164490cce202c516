"""torch's settings that bear on whether a fixed model stays finite and how close to fp32 it is, as they are here."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

matmul: Any = torch.backends.cuda.matmul
cuda: Any = torch.backends.cuda


class Setting(NamedTuple):
    """One setting."""

    name: str  # what a program writes to change it
    value: Any  # None where this torch has no such setting
    matters: str  # to a fixed model: "finiteness", "closeness", "stock only" or "no"
    risky: bool = False  # as it is here, a fixed model could overflow


def settings() -> list[Setting]:
    """Every setting that matters, and some that are often suspected and do not."""
    halved = _value(lambda: cuda.fp16_bf16_reduction_math_sdp_allowed())
    fallback = _value(lambda: cuda.math_sdp_enabled())
    prefix = "torch.backends.cuda"
    return [
        Setting(f"{prefix}.allow_fp16_bf16_reduction_math_sdp", halved, "finiteness", risky=bool(halved and fallback)),
        Setting(f"{prefix}.enable_math_sdp", fallback, "no"),
        Setting(
            f"{prefix}.matmul.allow_fp16_accumulation", _value(lambda: matmul.allow_fp16_accumulation), "closeness"
        ),
        Setting(
            f"{prefix}.matmul.allow_fp16_reduced_precision_reduction",
            _value(lambda: matmul.allow_fp16_reduced_precision_reduction),
            "closeness",
        ),
        Setting(
            f"{prefix}.matmul.allow_bf16_reduced_precision_reduction",
            _value(lambda: matmul.allow_bf16_reduced_precision_reduction),
            "closeness",
        ),
        Setting("torch.set_float32_matmul_precision", _value(torch.get_float32_matmul_precision), "closeness"),
        Setting(f"{prefix}.matmul.allow_tf32", _value(lambda: matmul.allow_tf32), "closeness"),
        Setting("torch.autocast", autocast_here(), "stock only"),
    ]


def _value(read: Callable[[], Any]) -> Any:
    """A setting's value; None where this torch lacks it, or refuses to say because old and new names were mixed."""
    try:
        found = read()
    except (AttributeError, RuntimeError):
        return None
    return list(found) if isinstance(found, tuple) else found


def autocast_here() -> str:
    """The device types with autocast on and its dtype, or "off"."""
    kinds = [kind for kind in ("cuda", "mps", "cpu") if torch.amp.is_autocast_available(kind)]
    on = [kind for kind in kinds if torch.is_autocast_enabled(kind)]
    return ", ".join(f"{kind} {str(torch.get_autocast_dtype(kind)).removeprefix('torch.')}" for kind in on) or "off"
