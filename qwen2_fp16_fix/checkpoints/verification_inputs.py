"""What a verification runs on: a checkpoint folder that can be verified, and a text as its tokens."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..code_copies import is_plain_linear
from ..demo import CHECKPOINT, quiet
from ..errors import CheckpointError, VerificationError
from ..files import read_utf8
from ..patches.errors import NotQwen2Error
from ..patches.modeling_qwen2_fp16 import ORIGINAL
from ..patches.scaling import PLAIN
from .weight_sources import FolderSource, reachable

PASSAGE = CHECKPOINT / "held_out.txt"
VOCABULARIES = ("tokenizer.json", "vocab.json")  # transformers 5 builds an empty tokenizer where there is neither


def open_checkpoint(folder: Path) -> FolderSource:
    """The folder, checked: a Qwen2 whole, in plain floating-point weights. Raises CheckpointError or NotQwen2Error."""
    with reachable(folder):
        is_file = folder.is_file()
    if is_file:
        raise CheckpointError(f"{folder} is a file: give the folder it lies in, which is what transformers loads.")
    source = FolderSource(folder)
    if source.config.get("quantization_config"):
        raise CheckpointError(f"{folder} is quantised: there is no fp32 to compare with, give the original checkpoint.")
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} holds a PEFT adapter: merge it (merge_and_unload) and save the merged model.")
    source.check_complete()
    return source


@contextmanager
def saved(model: nn.Module) -> Iterator[Path]:
    """A loaded model as a checkpoint in a temporary folder. Raises CheckpointError or NotQwen2Error."""
    _check_loaded(model)
    with tempfile.TemporaryDirectory(prefix="qwen2-fp16-fix-", ignore_cleanup_errors=True) as folder:
        try:
            with quiet():
                model.save_pretrained(folder)  # type: ignore[operator]
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"transformers cannot save this model ({first_line(error)}).") from None
        yield Path(folder)


def _check_loaded(model: Any) -> None:
    """Raises where saving the model would lose what it computes with."""
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise CheckpointError("this model has a PEFT adapter: merge it (merge_and_unload), then verify the model.")
    if not isinstance(model, STOCK.Qwen2ForCausalLM):
        raise NotQwen2Error(f"this is a {type(model).__qualname__}: verify takes a Qwen2ForCausalLM, or its folder.")
    for module, stock in ((model, STOCK.Qwen2ForCausalLM), (model.model, STOCK.Qwen2Model)):
        if type(module).forward is not stock.forward:
            raise CheckpointError(
                f"{type(module).__qualname__} has a forward of its own: what verify builds from the weights is "
                "transformers' Qwen2, another model."
            )
    if getattr(model.config, "quantization_config", None):
        raise CheckpointError("this model is quantised: there is no fp32 to compare with, load it unquantised.")
    for name, module in model.named_modules():
        if name.endswith("_proj") and not is_plain_linear(module):
            raise CheckpointError(f"{name} is a {type(module).__name__}: verify takes a model of plain linear layers.")
    for name, weight in model.named_parameters():
        if weight.is_meta or weight.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{name} is quantised or not loaded: verify takes a model with its weights in place.")


def read_text(text: str | Path | None) -> str:
    """The text itself, a UTF-8 file's, or the passage that comes with the package. Raises VerificationError."""
    if isinstance(text, str):
        found, name = text, "the text"
    else:
        path = PASSAGE if text is None else text
        found, name = read_utf8(path, "a text file", VerificationError), str(path)
    if not found.strip():
        raise VerificationError(f"{name} is empty: give a text of at least two tokens.")
    return found


def tokens_of(text: str, source: FolderSource, folder: Path, tokenizer: Any = None) -> Tensor:
    """The text as tokens (1, S), int64, by the folder's tokenizer or by one given. Raises CheckpointError."""
    with quiet():
        tokens: Tensor = (tokenizer or open_tokenizer(folder))(text, return_tensors="pt")["input_ids"]
    tokens = tokens.to("cpu", torch.int64)
    if tokens.shape[1] < 2:
        raise VerificationError("the text is a single token: give one of at least two.")
    rows = source.config.get("vocab_size")
    if isinstance(rows, int) and int(tokens.max()) >= rows:
        raise CheckpointError(
            f"the tokenizer gives token {int(tokens.max())}, but the model's vocabulary ends at {rows - 1}: it is "
            "another model's tokenizer."
        )
    return tokens


def open_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises CheckpointError."""
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(f"{folder} has no tokenizer: copy tokenizer.json of the original checkpoint into it.")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded ({first_line(error)}).") from None


def first_line(error: Exception) -> str:
    """What an error of another library says first, to go into a sentence of ours."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
