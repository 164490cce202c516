"""Text to token ids, by the tokenizer of a checkpoint."""

from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ..errors import CheckpointError, HubError, VerificationError, first_line
from ..files.packaged import PASSAGE
from ..files.reading import SURROGATE, read_utf8
from ..patches.errors import Qwen2FP16FixError
from .folder import FolderSource
from .hub_ids import VOCABULARIES, Wanted, find_checkpoint
from .loading import quiet

TEXT_FILES = (".txt", ".md", ".json", ".jsonl")


def file_named(text: str, refusal: type[Qwen2FP16FixError]) -> Path | None:
    """The file whose path a text is, as "prompts.txt"; None for what is a text. Raises `refusal` if it is not there."""
    if any(sign in text for sign in "\n\0") or not (Path(text).suffix or "/" in text):
        return None
    try:
        if Path(text).is_file():
            return Path(text)
    except OSError:  # a text that is too long for a path
        return None
    if text.endswith(TEXT_FILES) and " " not in text:
        raise refusal(f"there is no file {text}: name one that is there, or give the text itself.")
    return None


def read_text(text: str | Path | None) -> str:
    """The text itself, that of a UTF-8 file, or by default the packaged passage. Raises VerificationError."""
    if isinstance(text, str):
        text = file_named(text, VerificationError) or text
    elif text is not None and not isinstance(text, PathLike):
        raise VerificationError(f"the text is a {type(text).__qualname__}: give a text, or the path of one.")
    if isinstance(text, str):
        found, name = text, "the text"
    else:
        path = PASSAGE if text is None else text
        found, name = read_utf8(path, "a text file", VerificationError), str(path)
    if SURROGATE.search(found):
        raise VerificationError(f"{name} has half of a surrogate pair, which is not a character: remove it.")
    if not found.strip():
        raise VerificationError(f"{name} is empty: give a text of at least two tokens.")
    return found


def tokens_of(text: str, source: FolderSource, folder: Path, tokenizer: Any = None) -> Tensor:
    """The text as tokens (1, S), int64, by the folder's tokenizer or by the one given.

    Raises CheckpointError if the tokenizer cannot be loaded or is another model's, and VerificationError for a text of
    one token.
    """
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


def tokenizer_in(given: Any, model: Any) -> Any:
    """The tokenizer beside a loaded model: of a pipeline, a Trainer or lm-eval's HFLM, or of the model's checkpoint.

    None if there is none on this machine.
    """
    for name in ("processing_class", "tokenizer"):
        if hasattr(found := getattr(given, name, None), "convert_ids_to_tokens"):
            return found
    checkpoint = getattr(getattr(model, "config", None), "_name_or_path", None)
    try:
        return open_tokenizer(find_checkpoint(checkpoint, Wanted(download=False))) if checkpoint else None
    except (CheckpointError, HubError):
        return None
