"""The rows of a verification. Each is one way of running a checkpoint, measured against the oracle's logits.

The oracle is the first row: stock transformers in float32 with eager attention.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from ..activations.extremes import Magnitudes
from ..checkpoints.loading import checkpoint_at_fault, first_run, forward, load, quiet
from ..errors import CheckpointError
from ..model_status import examine_model
from ..patches.errors import PatchConflictError
from .divergence import Divergence, OracleLogits, Window
from .peak_memory import PeakMemory
from .result import MeasuredRow

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PROMPT_TOKENS, NEW_TOKENS = 32, 32
UNKNOWN: dict[str, Any] = dict.fromkeys(
    ("perplexity", "kl_mean", "kl_max", "top1_agreement", "largest_logit_difference"), None
)  # of a row that is not finite


@dataclass(frozen=True)
class Row:
    """One way of running the checkpoint."""

    dtype: str
    attention: str
    fixed: bool

    @property
    def name(self) -> str:
        """The name of the row in tables and sentences."""
        return f"{'fixed' if self.fixed else 'stock'} {self.dtype} {self.attention}"


class Continuation(NamedTuple):
    """Greedy tokens, and the logits (tokens, vocabulary) in fp32 that each is the largest of."""

    tokens: list[int]
    logits: Tensor


ORACLE = Row("float32", "eager", fixed=False)


@dataclass
class RowInputs:
    """The inputs of every row. tokens (1, S); oracle: its logits; continuations: of it, by prompt."""

    folder: Path
    tokens: Tensor
    windows: list[Window]
    device: torch.device
    oracle: OracleLogits
    tick: Callable[[int], None]
    continuations: list[Continuation] = field(default_factory=list)


def planned_rows(device: torch.device) -> list[Row]:
    """Every row that can run on the device, the oracle first."""
    return [
        Row(dtype, attention, fixed)
        for dtype in DTYPES
        for attention in ("eager", "sdpa", *(() if dtype == "float32" else flash_attentions(device)))
        for fixed in (False, True)
    ]


def flash_attentions(device: torch.device) -> list[str]:
    """The flash kernels that are installed and run on this device: the second from Ampere on, the third on Hopper."""
    if device.type != "cuda":
        return []
    major, _ = torch.cuda.get_device_capability(device)
    fits = {2: major >= 8, 3: major == 9}
    installed = (getattr(transformers.utils, f"is_flash_attn_{number}_available", lambda: False) for number in fits)
    return [
        f"flash_attention_{number}" for number, there in zip(fits, installed, strict=True) if fits[number] and there()
    ]


def measure(inputs: RowInputs, row: Row) -> MeasuredRow:
    """Loads the row's model, scores the text with it, continues the prompts, and gives the row.

    Raises CheckpointError if the oracle itself is not finite: there is nothing to compare with.
    """
    peak = PeakMemory(inputs.device)
    model = open_row(inputs.folder, row, inputs.device)
    divergence, broken, seconds = score(inputs, model, keep=row == ORACLE)
    site = first_overflow(model, inputs, broken or inputs.windows[0])
    if broken is not None and row == ORACLE:
        raise CheckpointError(
            f"{row.name} is not finite, first in {site or 'the logits'}: the checkpoint is broken, and there is "
            "nothing to compare with."
        )
    with first_run() if row == ORACLE else nullcontext():
        continued = [continuation(model, prompt) for prompt in prompts_of(inputs.tokens)]
    if row == ORACLE:
        inputs.continuations = continued
    pairs = zip(continued, inputs.continuations, strict=True)
    differences = tuple(first_difference(ours.tokens, theirs.tokens) for ours, theirs in pairs)
    return MeasuredRow(
        name=row.name,
        dtype=row.dtype,
        attention=row.attention,
        fixed=row.fixed,
        finite=broken is None,
        **(divergence.summary() if broken is None else UNKNOWN),
        first_overflow=site,
        first_differences=differences,
        first_margins=tuple(map(margin_at, differences, continued, inputs.continuations)),
        seconds=round(seconds, 3),
        peak_bytes=peak.bytes(),
    )


def open_row(folder: Path, row: Row, device: torch.device) -> nn.Module:
    """The row's model, on the device, checked to be stock or fixed as the row's name says.

    Raises CheckpointError if transformers cannot load it, PatchConflictError if it is not what the name says.
    """
    with checkpoint_at_fault(f"transformers cannot load {folder} as {row.name}"):
        model = load(folder, row.fixed, DTYPES[row.dtype], row.attention)
    model = model.to(device)
    found = examine_model(model).to_dict()
    asked = (row.fixed, row.dtype, row.attention)
    partly = not row.fixed and any(part["fixed"] for part in found["parts"].values())
    if found["problem"] or partly or (found["fixed"], found["dtype"], found["attention"]) != asked:
        raise PatchConflictError(
            f"{row.name} was loaded as {'fixed' if partly or found['fixed'] else 'stock'} {found['dtype']} "
            f"{found['attention']}: run verify in a process of its own, in which nothing else changes Qwen2."
        )
    return model


def score(inputs: RowInputs, model: nn.Module, keep: bool) -> tuple[Divergence, Window | None, float]:
    """The divergence over the windows, the first window with logits that are not finite (the last run), and seconds.

    keep: the model is the oracle, whose logits are kept and then compared with themselves.
    """
    divergence, seconds = Divergence(), 0.0
    for index, window in enumerate(inputs.windows):
        started = time.monotonic()
        with first_run() if keep else nullcontext():  # an error in a fixed model would be ours
            logits = forward(model, inputs.tokens[:, window.start : window.end].to(inputs.device))[0]
        finite = bool(torch.isfinite(logits).all())  # waits for the GPU
        seconds += time.monotonic() - started
        if not finite:
            inputs.tick(len(inputs.windows) - index)
            return divergence, window, seconds
        scored = logits[window.predictions]
        if keep:
            inputs.oracle.put(index, scored)
        divergence.add(scored, inputs.oracle.get(index), inputs.tokens[0, window.first : window.end])
        inputs.tick(1)
    return divergence, None, seconds


def first_overflow(model: nn.Module, inputs: RowInputs, window: Window) -> str | None:
    """The first site that is not finite when the window runs. A run of its own: watching would slow the scoring."""
    with Magnitudes(model) as magnitudes:
        forward(model, inputs.tokens[:, window.start : window.end].to(inputs.device))
    return magnitudes.first_overflow()


def prompts_of(tokens: Tensor) -> list[Tensor]:
    """Three prompts (1, P) from the beginning, the middle and the end of tokens (1, S)."""
    length = min(PROMPT_TOKENS, tokens.shape[1])
    last = tokens.shape[1] - length
    return [tokens[:, start : start + length] for start in (0, last // 2, last)]


@torch.no_grad()
def continuation(model: Any, prompt: Tensor) -> Continuation:
    """The greedy tokens that follow prompt (1, P)."""
    prompt = prompt.to(model.device)
    with quiet():
        found = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # Qwen2.5's own generation_config.json has another
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    tokens = [int(token) for token in found.sequences[0, prompt.shape[1] :]]
    return Continuation(tokens, torch.cat(found.scores).float().cpu())


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The index of the first token that differs, also if one continuation is shorter; None if they are equal."""
    pairs = enumerate(zip_longest(ours, theirs))
    return next((index for index, (own, other) in pairs if own != other), None)


def margin_at(index: int | None, ours: Continuation, theirs: Continuation) -> float | None:
    """By how much the oracle's logit of its own token is above that of our token, where the two texts part.

    None if they do not, or if one of them has ended there.
    """
    if index is None or index >= min(len(ours.tokens), len(theirs.tokens)):
        return None
    logits = theirs.logits[index]
    return float(logits[theirs.tokens[index]] - logits[ours.tokens[index]])
