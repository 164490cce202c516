"""The scan: how close each number of a Qwen2 comes to float16's limit on real prompts, and which passes it first.

`scan` returns plain data; `render` shows it. Prompts go through the model layer by layer, and a folder is read layer
by layer, so it may be larger than memory.

A stock model is run twice side by side: in its float16 arithmetic until a number is not finite, which says where it
breaks, and in fp32 on the same float16 weights, which says how large the numbers are that float16 cannot hold. A fixed
model is run as it is, and measured as it stores its numbers.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..activations.layerwise import LayerwiseRun
from ..activations.weights_on_demand import ModelOnDisk, WeightProvider
from ..certificate import certify
from ..checkpoints.folder import open_checkpoint
from ..errors import ScanError
from ..model_status import status
from ..patches.modeling_qwen2_fp16 import is_switched_off
from .measurements import FirstBreak, Observer, Survey
from .prompts import Prompts, check_loaded, choose_device, read_prompts, readable
from .quantisation import bias_spikes
from .result import findings
from .sentences import verdict

ATTENTIONS = ("eager", "sdpa")


def scan(
    model_or_path: nn.Module | str | Path,
    prompts: Prompts | None = None,
    *,
    fixed: bool | None = None,
    attention: str = "eager",
    tokenizer: Any = None,
    tokens: int = 2048,
    device: str | None = None,
    progress: Console | None = None,
) -> dict[str, Any]:
    """Runs prompts through a Qwen2 and measures every site of every layer against float16's limit of 65504.

    model_or_path: a checkpoint folder, run as stock float16 unless `fixed`, or a loaded float16 model, taken as it is.
    prompts: a text, texts or lists of token ids, or a Path to a file (a prompt a line, or a JSON list); by default four
    short ones. Texts go through the tokenizer's chat template if it has one. tokens: how many of a prompt's are read.
    attention: "eager", where stock stores raw scores, or "sdpa", for a folder. tokenizer: in place of the folder's; a
    loaded model needs one for texts. device: for a folder; by default cuda where there is one. progress: a rich Console
    to show a bar on.
    Returns a dict fit for JSON: `versions` (as `status()`), `checkpoint`, `foreign_code` (the class of the folder's own
    code that loads in place of what is scanned, or None), `settings`, `model` (sizes), `prompts`,
    `sites`, `first_nonfinite`, `massive_activations`, `bias_spikes`, `quantisation`, `certificate`, `finite`,
    `verdict` (a sentence) and `seconds`. A site has `layer` (None at the ends), `site`, `largest`, `stored_as` (None
    for scores that a kernel keeps to itself), `headroom_bits` (log2 of what that type holds over the largest),
    `subnormal_share`, where the largest was (`prompt`, `position`, `token_id`, `token`, `channel`; for scores also
    `head`, `key_position`, `key_token_id` and `key_token`) and `bound`, what certify proves for any prompt. What is not
    finite or not known is None.
    Raises CheckpointError and NotQwen2Error for a model that cannot be scanned, ScanError for the rest.
    """
    started = time.monotonic()
    _check_settings(attention, tokens)
    asked = read_prompts(prompts)
    subject: WeightProvider
    if isinstance(model_or_path, nn.Module):
        subject, fixed = check_loaded(model_or_path, fixed)
        name = type(model_or_path).__qualname__
        attention = str(getattr(subject.base.config, "_attn_implementation", attention))
    else:
        fixed, name = bool(fixed), str(model_or_path)
        subject = _open_folder(Path(model_or_path), fixed, attention, device)
    read = readable(asked, subject, tokenizer, tokens)
    survey, first, spikes = walk(subject, read.ids, fixed, progress)
    found = {
        "versions": status().to_dict(),
        "checkpoint": name,
        "foreign_code": subject.source.foreign_code if isinstance(subject, ModelOnDisk) else None,
        "settings": {"fixed": fixed, "attention": attention, "tokens": tokens, "device": str(subject.device)},
        **findings(survey, first, spikes, read, fixed, attention, certify(model_or_path, progress).to_dict()),
    }
    return found | {"verdict": verdict(found), "seconds": round(time.monotonic() - started, 2)}


def _check_settings(attention: str, tokens: int) -> None:
    if attention not in ATTENTIONS:
        raise ScanError(f"{attention!r} is no attention to scan: give {' or '.join(ATTENTIONS)}.")
    if tokens < 1:
        raise ScanError(f"{tokens} tokens of a prompt leave nothing to scan: give at least 1.")


def check_switch() -> None:
    """Raises ScanError where the environment switches the fix off."""
    if is_switched_off():
        raise ScanError("QWEN2_FP16_FIX=0 switches the fix off, so nothing here would be fixed: unset it.")


def _open_folder(folder: Path, fixed: bool, attention: str, device: str | None) -> ModelOnDisk:
    if fixed:
        check_switch()
    return ModelOnDisk(folder, open_checkpoint(folder), fixed, attention, choose_device(device))


def walk(
    subject: WeightProvider, ids: list[Tensor], fixed: bool, progress: Console | None
) -> tuple[Survey, FirstBreak | None, list[dict[str, Any]]]:
    """Takes the prompts through the model: what was measured, where stock float16 broke, and the spikes of the biases.

    Stock goes in float16 until it breaks and beside that in fp32, which is measured; fixed goes once, and is measured.
    """
    survey, first = Survey(), None if fixed else FirstBreak()
    spikes: list[dict[str, Any]] = []
    with subject.embedding():
        running: list[tuple[LayerwiseRun, Observer]] = [(LayerwiseRun(subject, ids, full_precision=not fixed), survey)]
        if first is not None:
            running.insert(0, (LayerwiseRun(subject, ids), first))
    for stream, observer in running:
        observer.start(stream)
    numbers = range(len(subject.base.layers))
    for number in numbers if progress is None else track(numbers, "scanning layers", console=progress):
        with subject.layer(number):
            layer = subject.base.layers[number]
            spikes += bias_spikes(number, layer.self_attn)
            for stream, observer in running:
                if not observer.done:
                    stream.step(number, partial(observer.watching, number, layer))
                    observer.close(number)
        running = [pair for pair in running if not pair[1].done]
    with subject.end():
        for stream, observer in running:
            observer.end(stream)
    return survey, first, spikes
