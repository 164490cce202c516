"""The verification: a checkpoint, stock and fixed, in three precisions and every attention, against stock fp32.

The table is that of transformers pull request 33317, for the user's own checkpoint. The weights are loaded for each row
and freed after it.
"""

import gc
import hashlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..checkpoints.folder import FolderSource, open_checkpoint
from ..checkpoints.hub_ids import Wanted, checkpoint_at
from ..checkpoints.loaded_model import saved
from ..checkpoints.threads import own_cores
from ..checkpoints.tokenizer import read_text, tokenizer_in, tokens_of
from ..code_copies import model_in
from ..errors import CheckpointError, VerificationError
from ..files.reading import to_path
from ..model_status import status
from ..patches.lock import is_switched_off
from ..progress import Progress, bar, console_of
from .divergence import OracleLogits, sliding_windows
from .judgement import shortcomings, verdict_of
from .result import MeasuredRow, VerificationResult, VerifiedRow
from .resume import FinishedRows, digest_of
from .rows import ORACLE, Row, RowInputs, measure, planned_rows
from .settings import Request, Settings


@own_cores()
def verify(  # noqa: PLR0913  # the options of the command
    model_or_path: Any,
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
    language: str = "en",
    progress: Progress = None,
) -> VerificationResult:
    """Runs a checkpoint stock and fixed, in fp32, float16 and bfloat16, and measures each row against stock fp32 eager.

    A row is one way of running the checkpoint: stock or fixed, a dtype, an attention implementation. The result has
    passed if every fixed row is finite and each fixed float16 row stays within `max_kl` and `max_ppl_drift`.

    Args:
        model_or_path: A checkpoint folder, OWNER/NAME or OWNER/NAME@REVISION on the Hub, or a loaded
            Qwen2ForCausalLM, which is saved to a temporary folder first. A pipeline or a Trainer stands for its model.
        text: The text, or the path of a UTF-8 file; by default a passage that comes with the package.
        tokenizer: Used in place of that of the folder, of the pipeline, or of the checkpoint that a loaded model comes
            from.
        window: Tokens that are read together; by default 1,024, or as many as the config allows if these are fewer.
        stride: Tokens from one window to the next; by default half a window.
        tokens: How many tokens of the text are read.
        device: "cpu" or "cuda"; by default cuda where there is one.
        max_kl: The largest mean KL divergence, in nats, that a fixed float16 row may have.
        max_ppl_drift: The largest relative change of perplexity that a fixed float16 row may have.
        resume: A JSON file that keeps finished rows, to continue after an interruption.
        language: Language of the sentences and of the table: "en" or "zh".
        progress: True for a bar on stderr, or a rich Console to show it on.

    Returns:
        A VerificationResult. `passed`, `verdict` and `reasons` give the outcome, `rows` the distance of each row from
        stock fp32 eager. `to_dict()` has the same as plain data.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete or damaged.
        NotQwen2Error: The checkpoint or model is not a Qwen2.
        HubError: The Hub cannot be reached, or does not give the checkpoint.
        VerificationError: Another argument cannot be used.
        PatchConflictError: A stock row turns out to be patched, or a fixed one not to be.
    """
    if is_switched_off():
        raise VerificationError("QWEN2_FP16_FIX=0 switches the fix off, so nothing here would be fixed: unset it.")
    request = Request(
        text=text,
        tokenizer=tokenizer,
        window=window,
        stride=stride,
        tokens=tokens,
        device=device,
        max_kl=max_kl,
        max_ppl_drift=max_ppl_drift,
        resume=None if resume is None else to_path(resume, VerificationError),
        language=language,
        console=console_of(progress),
    )
    request.check()
    if isinstance(model_or_path, str | PathLike):
        with checkpoint_at(model_or_path, Wanted(tokenizer=tokenizer is None)) as folder:
            return _verify(folder, str(model_or_path), request)
    model = model_in(model_or_path, also="a checkpoint folder, OWNER/NAME, ")
    if tokenizer is None:
        request = replace(request, tokenizer=tokenizer_in(model_or_path, model))
    if request.tokenizer is None:
        raise CheckpointError("a loaded model has no tokenizer: pass tokenizer=, or verify its folder.")
    with saved(model) as folder:
        return _verify(folder, type(model).__qualname__, request)


def _verify(folder: Path, name: str, request: Request) -> VerificationResult:
    started = time.monotonic()
    finished = FinishedRows(request.resume)
    passage = read_text(request.text)
    source = open_checkpoint(folder)
    settings = request.settings(source.shape.positions)
    tokens = tokens_of(passage, source, folder, request.tokenizer)[:, : settings.tokens]
    settings = replace(settings, tokens=tokens.shape[1])
    planned = planned_rows(torch.device(settings.device))
    key = {} if request.resume is None else _key(folder, source, passage, tokens, settings, request.console)
    finished.begin(key)
    missing = [row for row in planned if row.name not in finished.rows]
    if missing:
        _fill(finished, missing, folder, source, tokens, settings, request.console)
    rows = with_drift([finished.rows[row.name] for row in planned])
    language = request.language
    reasons = (*shortcomings(rows, settings.max_kl, settings.max_ppl_drift, language), *source.warnings)
    return VerificationResult(
        versions=status(),
        checkpoint=name,
        settings=settings,
        rows=tuple(rows),
        reasons=reasons,
        passed=not reasons,
        verdict=verdict_of(rows, reasons, language),
        seconds=round(time.monotonic() - started, 2),
        language=language,
    )


def _key(
    folder: Path,
    source: FolderSource,
    passage: str,
    tokens: Tensor,
    settings: Settings,
    console: Console | None,
) -> dict[str, Any]:
    """Everything that finished rows depend on. `resume` accepts only a file with the same."""
    own = [folder / name for name in ("config.json", "generation_config.json") if (folder / name).is_file()]
    found = status().to_dict()
    gpu = torch.cuda.get_device_name(settings.device) if settings.device.startswith("cuda") else ""
    numbers = hashlib.sha256(str(tokens.tolist()).encode()).hexdigest()
    return {
        "checkpoint": digest_of([*own, *source.files], console),
        "text": hashlib.sha256(passage.encode()).hexdigest(),
        "tokenizer": numbers,  # by what it made of the text
        "window": settings.window,
        "stride": settings.stride,
        "number of tokens": settings.tokens,
        "device": f"{settings.device} {gpu}".strip(),
        "set of versions": {name: found[name] for name in ("package", "transformers", "torch", "patch")},
    }


def _fill(
    finished: FinishedRows,
    missing: Sequence[Row],
    folder: Path,
    source: FolderSource,
    tokens: Tensor,
    settings: Settings,
    console: Console | None,
) -> None:
    """Measures the rows that are missing. The oracle always runs first, since the other rows need its logits."""
    windows = sliding_windows(tokens.shape[1], settings.window, settings.stride)
    todo = [ORACLE, *(row for row in missing if row != ORACLE)]
    size = (tokens.shape[1] - 1) * int(source.config["vocab_size"])
    with (
        tempfile.TemporaryDirectory(prefix="qwen2-fp16-fix-", ignore_cleanup_errors=True) as logits,
        bar("verifying", len(todo) * len(windows), console) as shown,
    ):
        oracle = OracleLogits(Path(logits), size)
        inputs = RowInputs(folder, tokens, windows, torch.device(settings.device), oracle, shown.advance)
        for row in todo:
            shown.name(row.name)
            try:
                measured = measure(inputs, row)
            except torch.cuda.OutOfMemoryError:
                raise VerificationError(
                    f"the GPU's memory does not hold {row.name}: use the cpu device, or a smaller window."
                ) from None
            if row in missing:
                finished.add(measured)
            gc.collect()
            if inputs.device.type == "cuda":
                torch.cuda.empty_cache()


def with_drift(rows: Sequence[MeasuredRow]) -> list[VerifiedRow]:
    """The rows with the drift of each perplexity from that of the first, the oracle's."""
    oracle = rows[0].perplexity
    return [VerifiedRow(**vars(row), drift=_drift(row.perplexity, oracle)) for row in rows]


def _drift(perplexity: float | None, oracle: float | None) -> float | None:
    return None if perplexity is None or oracle is None else perplexity / oracle - 1
