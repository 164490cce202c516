"""Machines, checkpoints and reports that several tests of the doctor make up."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2_fp16_fix import model_status
from qwen2_fp16_fix.demo import CHECKPOINT
from qwen2_fp16_fix.diagnosis import doctor
from qwen2_fp16_fix.diagnosis.devices import Device
from qwen2_fp16_fix.diagnosis.remarks import Finding

CPU = Device("cpu", "cpu", "a CPU")
SECRET = "zanzibar"


def nvidia(name: str, major: int, minor: int, index: int = 0) -> Device:
    return Device("cuda", f"cuda:{index}", name, (major, minor))


def codes(findings: list[Finding]) -> list[str]:
    return [item.code for item in findings]


def pretend_release(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Lets the rooms that ask see another version. transformers puts a second module object in its own place."""
    for room in (doctor, model_status):
        monkeypatch.setattr(room.transformers, "__version__", version)


def copy_of_demo(folder: Path, **config: Any) -> Path:
    """The demo checkpoint with another config."""
    shutil.copytree(CHECKPOINT, folder)
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def replace_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Writes the weights of a copied checkpoint anew."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)
