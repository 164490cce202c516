"""What the fix costs before the first token: registering, loading, fixing a loaded model."""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

import qwen2_fp16_fix
from qwen2_fp16_fix.demo import quiet

from .models import build, sharing_weights
from .pairs import compare

ROOT = Path(__file__).parents[1]
REGISTER = """
import time
from transformers import AutoModelForCausalLM
{before}
started = time.perf_counter()
import qwen2_fp16_fix
qwen2_fp16_fix.register()
print(time.perf_counter() - started)
"""
#: What a process has done before it imports and registers the fix, beyond importing an Auto class of transformers.
BEFORE = {
    "register()": "",
    "register(), Qwen2 imported before": "from transformers import Qwen2ForCausalLM",
}


def measure(width: str, layers: int, budget: float) -> list[dict[str, Any]]:
    """Rows with a name and seconds, and stock's seconds where stock does the like. Fit for JSON."""
    rows: list[dict[str, Any]] = [{"name": name, "seconds": register_seconds(code)} for name, code in BEFORE.items()]
    model = build(width, layers, torch.float16)
    named = f"{width} width, {layers} layers"
    rows.append({"name": f"fix(model), {named}", "seconds": fix_seconds(model)})
    with tempfile.TemporaryDirectory() as folder, quiet():
        model.bfloat16().save_pretrained(folder)  # as it is released
        del model
        found = compare(
            lambda: Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float16),
            lambda: qwen2_fp16_fix.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float16),
            torch.device("cpu"),
            budget,
        )
    name = f"from_pretrained, files in the page cache, {named}"
    rows.append({"name": name, "seconds": found.right, "stock_seconds": found.left, "median": found.median})
    return rows


def register_seconds(before: str, times: int = 3) -> float:
    """The median over processes of their own."""
    command = [sys.executable, "-c", REGISTER.format(before=before)]
    runs = (subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(times))
    return statistics.median(float(run.stdout) for run in runs)


def fix_seconds(model: Any, times: int = 3) -> float:
    """The median over copies. Nearly all of it is planning: the bounds read every weight once."""
    found = []
    for _ in range(times):
        twin = sharing_weights(model)
        started = time.perf_counter()
        qwen2_fp16_fix.fix(twin)
        found.append(time.perf_counter() - started)
    return statistics.median(found)
