"""The demo checkpoint to be changed, in one file and in shards."""

import json
import shutil
from pathlib import Path

import pytest

from qwen2_fp16_fix.demo import CHECKPOINT
from tests.hub.examples import SHARDS


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The demo checkpoint, to be spoilt."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


@pytest.fixture
def sharded(checkpoint: Path) -> Path:
    """The same in shards with an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    where = {}
    for number in range(SHARDS):
        name = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::SHARDS]}
        save_file(part, checkpoint / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return checkpoint
