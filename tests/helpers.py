"""What stands in for something in several test files: a replica without a second GPU, a model with one plain answer."""

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

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def kl_to(oracle: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean over tokens of KL(oracle || logits), in nats, over logits (..., vocabulary)."""
    p, q = torch.log_softmax(oracle.double(), -1), torch.log_softmax(logits.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())
