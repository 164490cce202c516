"""The ways to run a forward, attention by attention and kernel by kernel, and how far its logits are from fp32's."""

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from qwen2_fp16_fix.patches import sdpa

from .. import workloads
from .proof import NotAvailable, first_line

#: Attention implementation, and the one kernel of torch that it may use, if not any.
WAYS: dict[str, tuple[str, str | None]] = {
    "eager": ("eager", None),
    "sdpa": ("sdpa", None),
    "sdpa flash": ("sdpa", "FLASH_ATTENTION"),
    "sdpa mem-efficient": ("sdpa", "EFFICIENT_ATTENTION"),
    "sdpa math": ("sdpa", "MATH"),
    "sdpa cudnn": ("sdpa", "CUDNN_ATTENTION"),
    "flex": ("flex_attention", None),
}
OLDER_CARDS = "EFFICIENT_ATTENTION"
LAST_TOKENS = 8  # that are read one by one over a cache


@contextlib.contextmanager
def kernel(name: str | None) -> Iterator[None]:
    """torch's fused attention by one kernel alone. A call that it does not take raises NotAvailable.

    The memory-efficient kernel shares no key heads. It is what cards without flash have, so the fix runs as on those.
    torch warns why a kernel does not take a call. Which warnings these are differs from release to release.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name is None:
            yield
            return
        older = mock.patch.object(sdpa, "has_flash", return_value=False)
        try:
            with sdpa_kernel(getattr(SDPBackend, name)), older if name == OLDER_CARDS else contextlib.nullcontext():
                yield
        except (RuntimeError, AttributeError) as error:
            if "CUDA error" in str(error) or isinstance(error, torch.OutOfMemoryError):
                raise
            raise NotAvailable(first_line(error)) from error


def logits(model: Any, way: str, ids: Tensor, **inputs: Any) -> Tensor:
    """(B, S, vocabulary) in fp32 on the CPU."""
    attention, only = WAYS[way]
    model.config._attn_implementation = attention
    placed = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    with torch.no_grad(), kernel(only):
        found: Tensor = model(input_ids=ids.to(model.device), **placed).logits
        return found.float().cpu()


def over_a_cache(model: Any, way: str, ids: Tensor, last: int = LAST_TOKENS) -> tuple[Tensor, Any]:
    """`logits` with the last tokens read one by one over a DynamicCache, and the cache in the end."""
    cache, first = DynamicCache(), ids.shape[1] - last
    rows = [logits(model, way, ids[:, :first], use_cache=True, **{workloads.CACHE: cache})]
    for at in range(first, ids.shape[1]):
        rows.append(logits(model, way, ids[:, at : at + 1], use_cache=True, **{workloads.CACHE: cache}))
    return torch.cat(rows, 1), cache


def kl(oracle: Tensor, found: Tensor) -> float | None:
    """Mean over tokens of KL(oracle || found) in nats; None where logits are not finite, as JSON has no NaN."""
    p, q = torch.log_softmax(oracle.double(), -1), torch.log_softmax(found.double(), -1)
    value = float((p.exp() * (p - q)).sum(-1).mean())
    return value if math.isfinite(value) and bool(found.isfinite().all()) else None
