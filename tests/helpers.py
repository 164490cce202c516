"""What several test files share: the measure of divergence, and stand-ins: a second GPU, a quantised linear."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.parallel.replicate
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]


def replicated(model: nn.Module, monkeypatch: pytest.MonkeyPatch, detach: bool = True) -> Any:
    """`model` as DataParallel hands it to a device: its tensors are plain attributes. The way to a GPU is left out."""
    module: Any = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(
        module,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[each.view_as(each) for each in tensors] for _ in devices],
    )
    return module.replicate(model, [0, 0], detach=detach)[1]


class Logits(nn.Module):
    """Tokens in, logits out: what torch.export can write a signature for."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


class Quantised(nn.Linear):
    """Stands for bitsandbytes': int8 weights, rows with a scale each, a bias that is added last, if there is one."""

    __module__ = "bitsandbytes.nn.stands_for"

    @classmethod
    def of(cls, linear: Any) -> Any:
        """`linear`'s weights quantised, its bias as it is."""
        made = cls(linear.in_features, linear.out_features, device="meta")
        scale = linear.weight.detach().abs().amax(1, keepdim=True).float() / 127
        made.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        made.bias = linear.bias
        made.register_buffer("scale", scale)
        return made

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weights that it computes with."""
        return (self.weight * self.scale).to(dtype)

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]  # nn.Linear calls it input
        product = nn.functional.linear(hidden, self.dequantised(hidden.dtype))
        return product if self.bias is None else product + self.bias


def kl_to(oracle: Tensor, logits: Tensor) -> float:
    """Mean over tokens of KL(oracle || logits), in nats, over logits (..., vocabulary)."""
    p, q = torch.log_softmax(oracle.double(), -1), torch.log_softmax(logits.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def skeleton(data: Any) -> Any:
    """Plain data with its keys in order, without its values: what a reader of the JSON relies on."""
    if isinstance(data, dict):
        return [(key, skeleton(value)) for key, value in data.items()]
    if isinstance(data, list):
        return [skeleton(each) for each in data]
    return "number" if isinstance(data, int | float) and not isinstance(data, bool) else type(data).__name__
