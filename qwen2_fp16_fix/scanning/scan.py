"""The scan: how close each number of a Qwen2 comes to float16's limit on real prompts, and which passes it first.

Prompts go through the model layer by layer, and a folder is read layer by layer, so it may be larger than memory.

A stock model runs twice side by side. One run is in its float16 arithmetic until a number is not finite: it says where
the model breaks. The other is in fp32 on the same float16 weights: it says how large the numbers are that float16
cannot hold. A fixed model runs once, as it is, and is measured as it stores its numbers.
"""

import time
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from ..activations.extremes import Break
from ..activations.layerwise import LayerwiseRun
from ..activations.weights_on_demand import ModelOnDisk, WeightProvider
from ..certification.certify import certify
from ..checkpoints.folder import open_checkpoint
from ..checkpoints.hub_ids import Wanted, checkpoint_at
from ..checkpoints.threads import own_cores
from ..checkpoints.tokenizer import tokenizer_in
from ..code_copies import model_in
from ..errors import ScanError
from ..model_status import status
from ..patches.lock import is_switched_off
from ..progress import Progress, console_of, with_bar
from ..translations import check_language
from .findings import Findings
from .measurements import BreakSearch, Measurements
from .prompts import Prompts, check_loaded, choose_device, read_prompts, tokenise
from .quantisation import bias_spikes
from .result import BiasSpike, ScanResult, ScanSettings
from .sentences import verdict

ATTENTIONS = ("eager", "sdpa")


@own_cores()
def scan(  # noqa: PLR0913  # the options of the command
    model_or_path: Any,
    prompts: Prompts | None = None,
    *,
    fixed: bool | None = None,
    attention: str = "eager",
    tokenizer: Any = None,
    tokens: int = 2048,
    device: str | None = None,
    language: str = "en",
    progress: Progress = None,
) -> ScanResult:
    """Runs prompts through a Qwen2 and measures every site of every layer against float16's limit of 65504.

    A site is a tensor inside a layer, such as the input of down_proj.

    Args:
        model_or_path: A checkpoint folder, or OWNER/NAME or OWNER/NAME@REVISION on the Hub, run as stock float16
            unless `fixed`; or a loaded float16 model, taken as it is. A pipeline or a Trainer stands for its model.
        prompts: A text, texts or lists of token ids, or a file (a prompt a line, or a JSON list); by default four short
            ones. Texts go through the tokenizer's chat template if it has one.
        fixed: Whether to run a folder with the fix; by default stock.
        attention: "eager", where stock stores raw scores, or "sdpa", for a folder.
        tokenizer: Used in place of that of the folder, of the pipeline, or of the checkpoint that a loaded model comes
            from.
        tokens: How many tokens of each prompt are read.
        device: "cpu" or "cuda", for a folder; by default cuda where there is one.
        language: Language of the verdict and of the table: "en" or "zh".
        progress: True for a bar on stderr, or a rich Console to show it on.

    Returns:
        A ScanResult. `finite` and `verdict` give the outcome, `first_nonfinite` the place where the model broke,
        `sites` the largest number of each site, its place, its headroom, and what certify proves about it. `to_dict()`
        has the same as plain data; `save_html` and `save_png` write a report.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete or damaged.
        NotQwen2Error: The checkpoint or model is not a Qwen2.
        HubError: The Hub cannot be reached, or does not give the checkpoint.
        ScanError: Anything else.
    """
    started, console = time.monotonic(), console_of(progress)
    _check_settings(attention, tokens, language)
    asked = read_prompts(prompts)
    weights: WeightProvider
    if isinstance(model_or_path, str | PathLike):
        fixed, name = bool(fixed), str(model_or_path)
        wanted = Wanted(tokenizer=tokenizer is None and any(isinstance(prompt, str) for prompt in asked))
        with checkpoint_at(model_or_path, wanted) as folder:
            weights = _open_folder(folder, fixed, attention, device)
            read = tokenise(asked, weights, tokenizer, tokens)
        scanned: Any = folder
    else:
        scanned = model_in(model_or_path, also="a checkpoint folder, OWNER/NAME, ")
        weights, fixed = check_loaded(scanned, fixed)
        name = type(scanned).__qualname__
        attention = str(getattr(weights.base.config, "_attn_implementation", attention))
        tokenizer = tokenizer_in(model_or_path, scanned) if tokenizer is None else tokenizer
        read = tokenise(asked, weights, tokenizer, tokens)
    measured, broken, spikes = measure_prompts(weights, read.ids, fixed, console)
    findings = Findings(measured, broken, spikes, read, fixed, attention)
    found = ScanResult(
        versions=status(),
        checkpoint=name,
        foreign_code=weights.source.foreign_code if isinstance(weights, ModelOnDisk) else None,
        settings=ScanSettings(fixed, attention, tokens, str(weights.device)),
        **findings.fields(certify(scanned, console)),
        verdict="",
        seconds=0.0,
        language=language,
    )
    return replace(found, verdict=verdict(found, language), seconds=round(time.monotonic() - started, 2))


def _check_settings(attention: str, tokens: int, language: str) -> None:
    check_language(language, ScanError)
    if attention not in ATTENTIONS:
        raise ScanError(f"{attention!r} is not an attention that can be scanned: give {' or '.join(ATTENTIONS)}.")
    if tokens < 1:
        raise ScanError(f"{tokens} tokens of a prompt leave nothing to scan: give at least 1.")


def check_switch() -> None:
    """Raises ScanError if the environment switches the fix off."""
    if is_switched_off():
        raise ScanError("QWEN2_FP16_FIX=0 switches the fix off, so nothing here would be fixed: unset it.")


def _open_folder(folder: Path, fixed: bool, attention: str, device: str | None) -> ModelOnDisk:
    if fixed:
        check_switch()
    return ModelOnDisk(folder, open_checkpoint(folder), fixed, attention, choose_device(device))


def measure_prompts(
    weights: WeightProvider, ids: list[Tensor], fixed: bool, progress: Progress
) -> tuple[Measurements, Break | None, list[BiasSpike]]:
    """Runs the prompts through the model. Returns the measurements, the first break, and the spikes of the biases.

    After a break stock's float16 run is stopped: numbers after a NaN or infinity mean nothing.
    """
    measured, search, spikes = Measurements(), BreakSearch(), list[BiasSpike]()
    half: LayerwiseRun | None = None  # stock in float16, until it breaks
    with weights.embedding():
        if not fixed:
            half = LayerwiseRun(weights, ids)
        run = LayerwiseRun(weights, ids, full_precision=not fixed)
    if half is not None:
        search.start(half)
    measured.start(run)
    for number in with_bar(range(len(weights.base.layers)), "scanning layers", progress):
        with weights.layer(number):
            layer = weights.base.layers[number]
            spikes += bias_spikes(number, layer.self_attn)
            if half is not None and search.broken is None:
                search.step(half, number, layer)
            measured.step(run, number, layer)
        if search.broken is not None:
            half = None
    with weights.end():
        if half is not None:
            search.end(half)
        measured.end(run)
    return measured, measured.broken if fixed else search.broken, spikes
