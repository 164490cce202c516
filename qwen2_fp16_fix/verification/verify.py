"""The verification: a checkpoint, stock and fixed, in three precisions and every attention, against stock fp32.

`verify` returns plain data; `render` shows it. The table is that of transformers pull request 33317, for the user's own
checkpoint. The weights are loaded for each row and freed after it.
"""

import gc
import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from ..checkpoints.folder import FolderSource, open_checkpoint
from ..checkpoints.loaded_model import saved
from ..checkpoints.tokenizer import read_text, tokens_of
from ..demo import render_overflows
from ..errors import CheckpointError, VerificationError
from ..model_status import status
from ..patches.modeling_qwen2_fp16 import is_switched_off
from .divergence import OracleLogits, sliding_windows
from .resume import FinishedRows, fingerprint_files
from .rows import ORACLE, Bench, Row, measure, planned_rows

LONGEST_WINDOW = 1024  # unless asked for: eager attention stores a score for every pair of tokens


def verify(
    model_or_path: nn.Module | str | Path,
    text: str | Path | None = None,
    *,
    tokenizer: Any = None,
    window: int | None = None,
    stride: int | None = None,
    tokens: int = 4096,
    device: str | None = None,
    max_kl: float | None = None,
    max_ppl_drift: float | None = None,
    resume: str | Path | None = None,
    progress: Console | None = None,
) -> dict[str, Any]:
    """Runs a checkpoint stock and fixed, in fp32, float16 and bfloat16, and measures each row against stock fp32 eager.

    model_or_path: a checkpoint folder, or a loaded Qwen2ForCausalLM, which is saved to a temporary folder first.
    text: the text, or a Path to a UTF-8 file; by default a passage that comes with the package. tokenizer: used in
    place of the folder's; a loaded model needs one. window and stride: see `sliding_windows`; tokens: how many of the
    text's are read. device: "cpu" or "cuda"; by default cuda where there is one. progress: a rich Console to show the
    rows and a bar on.
    Returns a dict fit for JSON: `versions` (as `status()`), `checkpoint`, `settings`, `rows`, `reasons`, `passed`,
    `verdict` (a sentence) and `seconds`. A row has `name`, `dtype`, `attention`, `fixed`, `finite` (all logits),
    `perplexity`, `drift` (relative to the oracle's), `kl_mean` and `kl_max` (KL(oracle || row) of a token, in nats),
    `top1_agreement`, `largest_logit_difference`, `first_overflow` (the first site that is not finite, in the first
    window whose logits are not, or else in the first), `first_differences` (for each prompt the first greedy token
    that differs from the oracle's, or None), `seconds` (of the windows' forwards) and `peak_bytes` (see PeakMemory).
    What is not finite or not known is None.
    `passed`: every fixed row is finite and, where asked for, each fixed float16 row has a mean KL up to `max_kl` and a
    perplexity within `max_ppl_drift`, relatively. resume: see FinishedRows.
    Raises CheckpointError and NotQwen2Error for a model that cannot be verified, VerificationError for the rest of what
    is asked, PatchConflictError where stock is not stock.
    """
    if is_switched_off():
        raise VerificationError("QWEN2_FP16_FIX=0 switches the fix off, so nothing here would be fixed: unset it.")
    _check_thresholds(max_kl, max_ppl_drift)
    options: dict[str, Any] = {"window": window, "stride": stride, "tokens": tokens, "device": device}
    options |= {"max_kl": max_kl, "max_ppl_drift": max_ppl_drift, "resume": resume, "progress": progress}
    if isinstance(model_or_path, nn.Module):
        if tokenizer is None:
            raise CheckpointError("a loaded model has no tokenizer: pass tokenizer=, or verify its folder.")
        with saved(model_or_path) as folder:
            return _verify(folder, type(model_or_path).__qualname__, text, tokenizer, **options)
    return _verify(Path(model_or_path), str(model_or_path), text, tokenizer, **options)


def _verify(
    folder: Path,
    name: str,
    text: str | Path | None,
    tokenizer: Any,
    *,
    max_kl: float | None,
    max_ppl_drift: float | None,
    resume: str | Path | None,
    progress: Console | None,
    **asked: Any,
) -> dict[str, Any]:
    started = time.monotonic()
    passage = read_text(text)
    source = open_checkpoint(folder)
    settings = _settings(source, **asked)
    tokens = tokens_of(passage, source, folder, tokenizer)[:, : settings["tokens"]]
    settings["tokens"] = tokens.shape[1]
    device = torch.device(settings["device"])
    planned = planned_rows(device)
    finished = FinishedRows(
        None if resume is None else Path(resume),
        {} if resume is None else _key(folder, source, passage, tokens, settings, progress),
    )
    missing = [row for row in planned if row.name not in finished.rows]
    if missing:
        _fill(finished, missing, folder, source, tokens, settings, progress)
    rows = [finished.rows[row.name] for row in planned]
    for row in rows:
        row["drift"] = _drift(row["perplexity"], rows[0]["perplexity"])
    reasons = [*shortcomings(rows, max_kl, max_ppl_drift), *source.warnings]
    return {
        "versions": status().to_dict(),
        "checkpoint": name,
        "settings": settings | {"max_kl": max_kl, "max_ppl_drift": max_ppl_drift},
        "rows": rows,
        "reasons": reasons,
        "passed": not reasons,
        "verdict": _verdict(rows, reasons),
        "seconds": round(time.monotonic() - started, 2),
    }


def _check_thresholds(*thresholds: float | None) -> None:
    for threshold in thresholds:
        if threshold is not None and not 0 <= threshold < math.inf:
            raise VerificationError(f"a threshold of {threshold} decides nothing: give a number from 0.")


def _settings(
    source: FolderSource, window: int | None, stride: int | None, tokens: int, device: str | None
) -> dict[str, Any]:
    """The settings with their defaults filled in. Raises VerificationError for what cannot be run."""
    positions = source.shape.positions
    window = min(LONGEST_WINDOW, positions) if window is None else window
    if not 2 <= window <= positions:
        raise VerificationError(f"a window of {window} tokens: give 2 to {positions}, the positions of this model.")
    stride = window // 2 if stride is None else stride
    if not 1 <= stride < window:
        raise VerificationError(f"a stride of {stride} for a window of {window}: give 1 to {window - 1}.")
    if tokens < 2:
        raise VerificationError(f"{tokens} tokens: give at least 2, of which one is scored.")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise VerificationError(f"{device!r} is no device to verify on: give cpu or cuda.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise VerificationError(f"there is no {device} here: give cpu, or leave the device away.") from None
    return {"window": window, "stride": stride, "tokens": tokens, "device": device}


def _key(
    folder: Path,
    source: FolderSource,
    passage: str,
    tokens: Tensor,
    settings: dict[str, Any],
    progress: Console | None,
) -> dict[str, Any]:
    """What finished rows depend on."""
    if progress is not None:
        progress.print("reading the checkpoint, to know it again …", highlight=False)
    own = [folder / name for name in ("config.json", "generation_config.json") if (folder / name).is_file()]
    found = status().to_dict()
    gpu = torch.cuda.get_device_name(settings["device"]) if settings["device"].startswith("cuda") else ""
    numbers = hashlib.sha256(str(tokens.tolist()).encode()).hexdigest()
    return {
        "checkpoint": fingerprint_files([*own, *set(source.files.values())]),
        "text": hashlib.sha256(passage.encode()).hexdigest(),
        "tokenizer": numbers,  # by what it made of the text
        "window": settings["window"],
        "stride": settings["stride"],
        "number of tokens": settings["tokens"],
        "device": f"{settings['device']} {gpu}".strip(),
        "set of versions": {name: found[name] for name in ("package", "transformers", "torch", "patch")},
    }


def _fill(
    finished: FinishedRows,
    missing: Sequence[Row],
    folder: Path,
    source: FolderSource,
    tokens: Tensor,
    settings: dict[str, Any],
    progress: Console | None,
) -> None:
    """Measures the rows that are missing. The oracle runs first, again if its row is there: they need its logits."""
    windows = sliding_windows(tokens.shape[1], settings["window"], settings["stride"])
    todo = [ORACLE, *(row for row in missing if row != ORACLE)]
    size = (tokens.shape[1] - 1) * int(source.config["vocab_size"])
    with (
        tempfile.TemporaryDirectory(prefix="qwen2-fp16-fix-", ignore_cleanup_errors=True) as logits,
        _progress(progress, len(todo) * len(windows)) as (announce, tick),
    ):
        oracle = OracleLogits(Path(logits), size)
        bench = Bench(folder, tokens, windows, torch.device(settings["device"]), oracle, tick)
        for row in todo:
            announce(row.name)
            try:
                measured = measure(bench, row)
            except torch.cuda.OutOfMemoryError:
                raise VerificationError(
                    f"the GPU's memory does not hold {row.name}: use the cpu device, or a smaller window."
                ) from None
            if row in missing:
                finished.add(measured)
            gc.collect()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()


@contextmanager
def _progress(console: Console | None, steps: int) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """Two functions: one names the row that runs, one counts windows."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console or Console(quiet=True), disable=console is None, transient=True) as bar:
        task = bar.add_task("", total=steps)

        def announce(name: str) -> None:
            bar.update(task, description=name)
            if console is not None and not console.is_terminal:
                console.print(f"{name} …", highlight=False)

        yield announce, lambda windows: bar.advance(task, windows)


def _drift(perplexity: float | None, oracle: float | None) -> float | None:
    return None if perplexity is None or oracle is None else perplexity / oracle - 1


def shortcomings(rows: Sequence[dict[str, Any]], max_kl: float | None, max_ppl_drift: float | None) -> list[str]:
    """What keeps the rows from passing, a phrase for each, with the row's name first."""
    found = []
    for row in rows:
        if row["fixed"] and not row["finite"]:
            found.append(f"{row['name']} is not finite, first in {row['first_overflow'] or 'the logits'}")
        elif row["fixed"] and row["dtype"] == "float16":
            if max_kl is not None and not row["kl_mean"] <= max_kl:
                found.append(f"{row['name']} has a mean KL of {row['kl_mean']:.3g}, above {max_kl:g}")
            drift = row["drift"]
            if max_ppl_drift is not None and (drift is None or not abs(drift) <= max_ppl_drift):
                found.append(
                    f"{row['name']} has a perplexity drift of {_number(drift, '+.3g')}, past {max_ppl_drift:g}"
                )
    return found


def _verdict(rows: Sequence[dict[str, Any]], reasons: Sequence[str]) -> str:
    if reasons:
        more = f", and {len(reasons) - 1} more." if len(reasons) > 1 else "."
        return f"Not verified: {reasons[0]}{more}"
    half = [row for row in rows if row["fixed"] and row["dtype"] == "float16"]
    kl = max(row["kl_mean"] for row in half)
    drifts = [abs(row["drift"]) for row in half if row["drift"] is not None]
    broken = [row["name"] for row in rows if not row["finite"]]
    return (
        f"Verified: every fixed row is finite, and fixed float16 is within a mean KL of {kl:.2g} and a perplexity "
        f"drift of {_number(max(drifts, default=None), '.2g')} of stock float32"
        + (f"; not finite: {', '.join(broken)}." if broken else ".")
    )


def render(findings: dict[str, Any], console: Console) -> None:
    """Prints the table, where each row first was not finite, and the verdict."""
    settings = findings["settings"]
    console.print(
        f"{findings['checkpoint']}: {settings['tokens']} tokens, window {settings['window']}, stride "
        f"{settings['stride']}, on {settings['device']}; oracle: stock float32 eager",
        highlight=False,
        markup=False,
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)  # fits into 80 columns
    for head in ("", "ppl", "drift", "KL mean", "KL max", "top-1", "Δlogit", "text", "s", "MB"):
        table.add_column(head, justify="right" if head else "left")
    for row in findings["rows"]:
        table.add_row(*_cells(row), style=None if row["finite"] else "red")
    console.print(table)
    render_overflows(findings["rows"], console)
    for reason in findings["reasons"][1:]:
        console.print(f"not verified: {reason}", highlight=False, markup=False)
    console.print(findings["verdict"], highlight=False, markup=False)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    peak = row["peak_bytes"]
    same = sum(difference is None for difference in row["first_differences"])
    return (
        row["name"].replace("float", "fp").replace("bfp", "bf"),
        _number(row["perplexity"], ".4f") if row["finite"] else "NaN",
        _number(row["drift"], "+.1e"),
        _number(row["kl_mean"], ".1e"),
        _number(row["kl_max"], ".1e"),
        _number(row["top1_agreement"], ".3f"),
        _number(row["largest_logit_difference"], ".2g"),
        f"{same}/{len(row['first_differences'])}",
        f"{row['seconds']:.1f}",
        _number(None if peak is None else peak / 1e6, ".0f"),
    )


def _number(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)
