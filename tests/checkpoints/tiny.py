"""A tiny checkpoint with a tokenizer, and changes of its config.json, for tests that break or serve it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from qwen2_fp16_fix.files.packaged import DEMO_CHECKPOINT
from tests.stress import Shape, config

SHAPE = Shape(hidden=8, layers=1, heads=2, kv_heads=1, intermediate=6, vocab=1024)


def tiny_checkpoint(folder: Path) -> Path:
    """A Qwen2 with the demo's tokenizer, written into the folder."""
    transformers.Qwen2ForCausalLM(config(SHAPE)).half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_CHECKPOINT / name, folder)
    return folder


def settings(**changed: Any) -> Callable[[Path], None]:
    """Other values in config.json."""

    def change(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(found | changed))

    return change
