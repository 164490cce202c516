"""A checkpoint by the name that a user gives: a folder, a file, or OWNER/NAME[@REVISION] on the Hub.

Everything about the Hub is left to its own client: cache, offline mode, token, progress bars. It is asked for the files
that are read, and for no others.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it exports them, without saying so to mypy
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from ..errors import CheckpointError
from ..files.reading import to_path
from ..patches.errors import Qwen2FP16FixError
from .config import MODEL_TYPES, reachable, read_json
from .hub_answers import one_sentence
from .stored import INDEX, SINGLE

#: What is read of every checkpoint besides its weights.
SMALL = (
    "config.json",
    "generation_config.json",
    INDEX,
    "adapter_config.json",  # to see that it is there
    "version_map.py",  # of an export: the version of its arithmetic
)
TEMPLATES = "additional_chat_templates"
TOKENIZER = (
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    f"{TEMPLATES}/*",
)
VOCABULARIES = ("tokenizer.json", "vocab.json")  # without either file transformers 5 builds an empty tokenizer
#: Ends of a file's name. A name that has one is a path.
SUFFIXES = (".safetensors", ".bin", ".json", ".pt", ".pth", ".ckpt", ".gguf", ".zip", ".txt")
#: What to do about a repository without a file.
ADVICE = {
    "config.json": ": it is not a checkpoint of transformers, give another repository or revision",
    SINGLE: " and no index of shards: give a repository, or a revision, with .safetensors weights",
}


class HubId(NamedTuple):
    """A repository of the Hub and the revision that is asked for; None for the main branch."""

    repo: str
    revision: str | None


class Wanted(NamedTuple):
    """Which files of a checkpoint are needed, besides its configuration."""

    weights: bool = True  # those of a Qwen2; of another model none are downloaded
    tokenizer: bool = False
    also: tuple[str, ...] = ()  # patterns of files to have if the repository has them
    download: bool = True  # whether the Hub may be asked, and not its cache alone


WEIGHTS = Wanted()


def is_repo_id(name: str) -> bool:
    """Whether `name` is an OWNER/NAME, by the Hub's own rules."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and name.isascii()


def parse_id(given: str | os.PathLike[str]) -> HubId | None:
    """The Hub id that a name is if there is no such folder; None for what can only be a path.

    A path is what is given as a Path, begins with a dot, a slash or a tilde, has a backslash, two slashes or the suffix
    of a file, or whose first part is a folder here: a typo in it must not ask the Hub.
    """
    if not isinstance(given, str):
        return None
    name, at, revision = given.partition("@")
    if not is_repo_id(name) or name.endswith(SUFFIXES) or bool(at) != bool(revision):
        return None
    with reachable(Path(name)):
        return None if Path(name).parent.exists() else HubId(name, revision or None)


def find_checkpoint(given: str | os.PathLike[str], wanted: Wanted = WEIGHTS) -> Path:
    """The folder or the file of a checkpoint. What is on the Hub is downloaded into its cache, unless it is there.

    given: a folder, a file, or OWNER/NAME or OWNER/NAME@REVISION. A folder here wins. wanted: what is needed of it.
    Raises CheckpointError for a path where nothing is, HubError for what the Hub does not give.
    """
    if not isinstance(given, str | os.PathLike):
        raise CheckpointError(
            f"this is a {type(given).__qualname__}: give the path of a checkpoint, or OWNER/NAME of a model on the Hub."
        )
    path = to_path(given, CheckpointError)
    path = path.expanduser() if str(path).startswith("~") else path
    with reachable(path):
        if path.exists():
            return path
    asked = parse_id(given)
    if asked is None:
        raise CheckpointError(f"there is no {given}: {_advice(given)}.")
    with one_sentence(asked.repo, asked.revision):
        return _download(asked, wanted) if wanted.download else _snapshot(asked, (), local_files_only=True)


@contextmanager
def checkpoint_at(given: str | os.PathLike[str], wanted: Wanted = WEIGHTS) -> Iterator[Path]:
    """`find_checkpoint`, for a block that reads the checkpoint. An error in the block names it as the caller does."""
    found = find_checkpoint(given, wanted)
    try:
        yield found
    except Qwen2FP16FixError as error:
        if str(found) == str(given) or str(found) not in str(error):
            raise
        raise type(error)(str(error).replace(str(found), str(given))) from error.__cause__


def _advice(given: str | os.PathLike[str]) -> str:
    """What to do about a path where nothing is."""
    address = re.match(r"(?:https?://)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)", str(given))
    if address is not None and is_repo_id(address[1]):
        return f"give the name alone, {address[1]}, without the address of the Hub"
    name, at, revision = str(given).partition("@")
    if not is_repo_id(name) or name.endswith(SUFFIXES):
        return "give a checkpoint folder, a .safetensors file, or OWNER/NAME of a model on the Hub"
    if not isinstance(given, str):
        return "a Path is never looked up on the Hub; give a str for that"
    if bool(at) != bool(revision):
        return "give a branch, a tag or a commit after the @"
    return (
        f"{Path(name).parent} is a folder here, so this is taken for a path; for the model on the Hub, give the folder "
        f"that `hf download {name}` prints"
    )


# The Hub


def _download(asked: HubId, wanted: Wanted) -> Path:
    """The snapshot of a repository in the Hub's cache."""
    with _no_bars():
        folder = _snapshot(asked, [*SMALL, *(TOKENIZER if wanted.tokenizer else ()), *wanted.also])
    if (folder / "adapter_config.json").is_file():
        return folder
    _check_there(asked, folder, ["config.json"])
    if read_json(folder / "config.json").get("model_type") not in MODEL_TYPES:
        return folder
    if wanted.tokenizer and not any((folder / name).is_file() for name in VOCABULARIES):
        _check_there(asked, folder, VOCABULARIES[:1])
    files = _weight_files(folder) if wanted.weights else []
    if not all((folder / name).is_file() for name in files):
        # by the commit, so that all files are of one, whatever is pushed meanwhile; a single file beside shards is
        # asked for as well: it is an error, and must be seen
        _snapshot(HubId(asked.repo, folder.name), [SINGLE, *files])
        _check_there(asked, folder, files)
    return folder


def _snapshot(asked: HubId, patterns: Sequence[str], **options: bool) -> Path:
    """The folder of a commit in the cache. Without a network it may lack some of the files."""
    named: Any = {"revision": asked.revision, "allow_patterns": list(patterns), **options}
    try:
        return Path(huggingface_hub.snapshot_download(asked.repo, **named))
    except LocalEntryNotFoundError as error:
        found = getattr(error, "snapshot_path", None)  # newer clients do not return an incomplete one, older ones do
        if found is None:
            raise
        return Path(found)


def _weight_files(folder: Path) -> list[str]:
    """The shards that the index names, or the one file of weights."""
    if not (folder / INDEX).is_file():
        return [SINGLE]
    listed = read_json(folder / INDEX).get("weight_map")
    files = listed.values() if isinstance(listed, dict) else ()
    # names of other places are left to `FolderSource`, which refuses them
    return sorted({file for file in files if isinstance(file, str) and re.fullmatch(r"[\w.-]+\.safetensors", file)})


def _check_there(asked: HubId, folder: Path, names: Sequence[str]) -> None:
    """Asks for each file that a snapshot lacks, so that the client says why: there is none, or no network."""
    for name in names:
        if (folder / name).is_file():
            continue
        try:
            huggingface_hub.hf_hub_download(asked.repo, name, revision=folder.name)
        except LocalEntryNotFoundError:  # no network; before 1.0 it is an EntryNotFoundError, too
            raise
        except EntryNotFoundError:
            raise CheckpointError(f"{asked.repo} has no {name}{ADVICE.get(name, '')}.") from None


@contextmanager
def _no_bars() -> Iterator[None]:
    """For the download of small files."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
