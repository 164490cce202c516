"""The demonstration: one checkpoint, one prompt, stock and fixed, in fp32 and float16.

`measure` returns plain data; `render` shows it. The checkpoint lies beside this file, so nothing is downloaded.
"""

import gc
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from torch import Tensor, nn

from .activations.extremes import Magnitudes
from .checkpoints.loading import forward, load, quiet
from .errors import CheckpointError, ExportError
from .files import DEMO_CHECKPOINT as CHECKPOINT
from .files import whole_folder
from .model_status import status
from .patches.range_plan import FLOAT16_MAX

PROMPT = "And the LORD said unto Moses,"
NEW_TOKENS = 48
WINDOW = 256  # tokens scored together for the perplexity

ROWS = (
    ("stock float32", False, torch.float32, "eager"),
    ("stock float16 eager", False, torch.float16, "eager"),
    ("stock float16 sdpa", False, torch.float16, "sdpa"),
    ("fixed float16 eager", True, torch.float16, "eager"),
    ("fixed float16 sdpa", True, torch.float16, "sdpa"),
)


def measure(folder: Path = CHECKPOINT, progress: Console | None = None) -> dict[str, Any]:
    """Runs the prompt through every row and returns the findings, fit for JSON.

    Keys: `versions` (as `status()`), `prompt`, `rows` (name, text, perplexity, finite, first_overflow), `peaks` (site
    and magnitude in fp32, largest first), `as_promised`: whether stock float16 broke in both backends and every fixed
    text equals the fp32 text. A perplexity that is not finite is None.
    Raises CheckpointError where `folder` holds no demo checkpoint.
    """
    tokenizer, passage = _load_text(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    rows: list[dict[str, Any]] = []
    peaks: list[dict[str, Any]] = []
    for name, fixed, dtype, attention in ROWS:
        if progress is not None:
            progress.print(f"{name} …", highlight=False)
        model = load(folder, fixed, dtype, attention)
        with Magnitudes(model) as magnitudes:
            logits = forward(model, prompt)
        if name == "stock float32":
            peaks = magnitudes.largest(4)
        perplexity = perplexity_of(model, passage)
        row = {
            "name": name,
            "text": generate(model, tokenizer, prompt),
            "perplexity": perplexity if math.isfinite(perplexity) else None,
            "finite": bool(torch.isfinite(logits).all()),
            "first_overflow": magnitudes.first_overflow(),
        }
        rows.append(row)
        del model
        gc.collect()
    return {"versions": status(), "prompt": PROMPT, "rows": rows, "peaks": peaks, "as_promised": _as_promised(rows)}


def save(folder: Path) -> None:
    """Puts the checkpoint into a new folder, for commands that take one. Raises ExportError where that cannot be."""
    with whole_folder(folder.absolute(), ExportError) as written:
        shutil.copytree(CHECKPOINT, written, dirs_exist_ok=True)


def _as_promised(rows: list[dict[str, Any]]) -> bool:
    """Stock float16 broke in both backends, and each fixed row says what fp32 says."""
    oracle, stock, fixed = rows[0], rows[1:3], rows[3:]
    broke = all(not row["finite"] and set(row["text"]) == {"!"} for row in stock)
    agrees = all(row["finite"] and row["text"] == oracle["text"] for row in fixed)
    return bool(oracle["finite"]) and broke and agrees


@torch.no_grad()
def perplexity_of(model: nn.Module, tokens: Tensor) -> float:
    """exp of the mean negative log likelihood of tokens (1, S), in windows that do not overlap; NaN stays NaN."""
    total, count = 0.0, 0
    for window in torch.split(tokens, WINDOW, dim=1):
        if window.shape[1] > 1:
            logits = forward(model, window)[0, :-1].double()
            total += float(nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
            count += window.shape[1] - 1
    return math.exp(total / count) if math.isfinite(total) else math.nan


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompt: Tensor) -> str:
    """The greedy continuation of the prompt."""
    with quiet():
        tokens = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    return str(tokenizer.decode(tokens[0, prompt.shape[1] :]))


def _load_text(folder: Path) -> tuple[Any, Tensor]:
    """The tokenizer, and the held-out passage as tokens (1, S)."""
    if not (folder / "config.json").is_file() or not (folder / "held_out.txt").is_file():
        raise CheckpointError(f"found no demo checkpoint in {folder}: reinstall qwen2-fp16-fix.")
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        text = (folder / "held_out.txt").read_text(encoding="utf-8")
        return tokenizer, tokenizer(text, return_tensors="pt")["input_ids"]


def render(findings: dict[str, Any], console: Console) -> None:
    """Prints the findings: the texts, the perplexities, and what was wrong where."""
    versions = findings["versions"]
    console.print(
        f"qwen2-fp16-fix {versions['package']}, transformers {versions['transformers']} (patch {versions['patch']}), "
        f"torch {versions['torch']}\n",
        highlight=False,
    )
    oracle = findings["rows"][0]["text"]
    for row in findings["rows"]:
        colour = "green" if row["text"] == oracle else "red"
        title = f"{row['name']}: {_perplexity(row)}"
        console.print(Panel(findings["prompt"] + row["text"], title=title, title_align="left", border_style=colour))
    table = Table("what float16 cannot hold", "in fp32", f"limit {FLOAT16_MAX:,.0f}", title_justify="left")
    for peak in findings["peaks"]:
        table.add_row(peak["site"], f"{peak['magnitude']:,.0f}", "passed" if peak["magnitude"] > FLOAT16_MAX else "")
    console.print(table)
    render_overflows(findings["rows"], console)
    verdict = "Stock float16 failed in both backends and the fix gives the fp32 text."
    console.print(f"\n{verdict if findings['as_promised'] else 'NOT as promised: see the rows above.'}", style="bold")


def render_overflows(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints where each row that is not finite first was so."""
    for row in rows:
        if row["first_overflow"] is not None:
            console.print(f"{row['name']}: first non-finite value in {row['first_overflow']}", highlight=False)


def _perplexity(row: dict[str, Any]) -> str:
    return "perplexity NaN" if row["perplexity"] is None else f"perplexity {row['perplexity']:.5f}"
