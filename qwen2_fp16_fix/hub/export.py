"""Exports a checkpoint as a folder for the Hub: its weights, and the fix beside them as remote code.

An export loads with `trust_remote_code=True`, without this package. Its code is the files of `patches/`, unchanged.
"""

import errno
import fnmatch
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from .. import locking
from ..checkpoints.config import reachable, read_config, read_json
from ..checkpoints.folder import FolderSource
from ..checkpoints.hub_ids import TEMPLATES, TOKENIZER, Wanted, checkpoint_at, is_repo_id
from ..checkpoints.stored import INDEX
from ..errors import CheckpointError, ExportError
from ..files.folders import whole_folder
from ..files.reading import to_path
from ..patches import errors as patches_errors
from ..results import Result
from ..verification.saved import read_saved
from . import model_card
from .export_config import check_foreign_code, exported_config, heads_to_check

PATCHES = Path(patches_errors.__file__).parent
CODE_FILES = tuple(sorted(path.name for path in PATCHES.glob("*.py")))
CARRIED = (*TOKENIZER, "generation_config.json", "quantize_config.json", "LICENSE*", "NOTICE*")
Weights = Literal["link", "copy", "none"]


def export(
    path_or_repo: str | Path,
    out: str | Path,
    *,
    weights: Weights = "link",
    code_repo: str | None = None,
    strict: bool = False,
    verification: Result | dict[str, Any] | str | Path | None = None,
) -> Path:
    """Exports a checkpoint with the fix as remote code, to load with `trust_remote_code=True` and without this package.

    The folder is written completely or not at all: after an error, an interruption or a kill there is nothing at `out`.

    Args:
        path_or_repo: A checkpoint folder, or OWNER/NAME or OWNER/NAME@REVISION on the Hub.
        out: A new folder, or an empty one.
        weights: "link" for hard links, or copies where links are not possible; "copy" for copies; "none" to export
            the code alone.
        code_repo: OWNER/NAME or OWNER/NAME@REVISION of a repository with the code, which is then not copied.
        strict: Whether to give the export a model type of its own. Loading it without `trust_remote_code` then fails
            instead of giving the stock class.
        verification: A result of `verify`, or a file with its JSON, for the model card.

    Returns:
        The path of the exported folder.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete or damaged.
        NotQwen2Error: The checkpoint is not a Qwen2.
        HubError: The Hub cannot be reached, or does not give the checkpoint.
        ExportError: Anything else: the place, an option, the disk, or a file beside the weights.
    """
    if weights not in ("link", "copy", "none"):
        raise ExportError(f"weights is {weights!r}: give link, copy or none.")
    code_name, code_revision = _code_repo(code_repo, weights)
    findings = None if verification is None else read_saved(verification, ExportError)
    target = to_path(out, ExportError).absolute()
    with checkpoint_at(path_or_repo, Wanted(weights != "none", also=(*CARRIED, "README.md"))) as found:
        folder = _real_folder(found)
        _check_apart(folder, target)
        config = read_config(folder)
        exported = exported_config(config, strict, code_name, _tokenizer_class(folder))
        files = [*_weight_files(folder, config, weights), *_carried_files(folder)]
        for file in files:
            _check_inside(file, folder)
        card = model_card.model_card(
            folder,
            exported,
            base_model=_cached_repo(folder),
            code_repo=code_name,
            code_revision=code_revision,
            has_weights=weights != "none",
            verification=findings,
        )
    with whole_folder(target, ExportError) as written:
        for file in files:
            _place(file, written / file.relative_to(folder), link=weights == "link" and file.suffix == ".safetensors")
        for name in () if code_name else CODE_FILES:
            shutil.copyfile(PATCHES / name, written / name)
        texts = {"config.json": json.dumps(exported, indent=2, ensure_ascii=False) + "\n", "README.md": card}
        if not code_name:  # a lock is of the code in the same folder
            texts[locking.FILE_NAME] = locking.as_text(locking.make_lock())
        for name, text in texts.items():
            (written / name).write_text(text, encoding="utf-8")
    return target


def _code_repo(code_repo: str | None, weights: str) -> tuple[str | None, str | None]:
    """OWNER/NAME and the revision, from `OWNER/NAME@REVISION`."""
    if code_repo is None:
        return None, None
    if weights == "none":
        raise ExportError("there is nothing to export, neither code nor weights: leave out --code-only or --code-repo.")
    name, at, revision = code_repo.partition("@")
    if not is_repo_id(name) or bool(at) != bool(revision):
        raise ExportError(f"{code_repo!r} is not a repository: give OWNER/NAME, or OWNER/NAME@REVISION.")
    return name, revision or None


def _real_folder(found: Path) -> Path:
    """The checkpoint's folder, absolute: the model card names it, and links are followed from there."""
    with reachable(found):
        if not found.is_dir():
            raise CheckpointError(f"{found} is a file: give the folder it is in.")
    return to_path(os.path.realpath(found), CheckpointError)


def _cached_repo(folder: Path) -> str | None:
    """OWNER/NAME if the folder is a snapshot in the Hub's cache, or None."""
    repo = folder.parents[1].name if folder.parent.name == "snapshots" else ""
    owner, _, name = repo.removeprefix("models--").partition("--")
    return f"{owner}/{name}" if repo.startswith("models--") and name else None


def _check_apart(folder: Path, target: Path) -> None:
    place = Path(os.path.realpath(target.parent), target.name)  # Path.resolve raises for a link to itself, to 3.12
    if place == folder or folder in place.parents:
        raise ExportError(f"{target} is inside {folder}, which would be exported into itself: name a folder outside.")
    if place in folder.parents:
        raise ExportError(f"{folder} is inside {target}: name a new folder to export into.")


def _weight_files(folder: Path, config: dict[str, Any], weights: str) -> list[Path]:
    """The shards and their index. Checked: nothing is missing, and transformers would load these files."""
    if weights == "none":
        return []
    source, index = FolderSource(folder), folder / INDEX
    for head in heads_to_check(config):
        source.check_complete(head)
    return [*source.files, *([index] if index.is_file() else [])]


def _tokenizer_class(folder: Path) -> str | None:
    """The class in tokenizer_config.json, if it names one. Raises ExportError for a tokenizer with code of its own."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    check_foreign_code(config, file.name)
    return config.get("tokenizer_class")


def _carried_files(folder: Path) -> list[Path]:
    """The files of the tokenizer, templates, generation configuration and licence."""
    names = (path.relative_to(folder).as_posix() for path in (*folder.iterdir(), *(folder / TEMPLATES).glob("*")))
    found = {name for name in names for pattern in CARRIED if fnmatch.fnmatch(name, pattern)}
    return [folder / name for name in sorted(found) if not (folder / name).is_dir()]


def _check_inside(file: Path, folder: Path) -> None:
    """Raises ExportError for a link out of the checkpoint. A snapshot may link to the blobs of its repository."""
    real = Path(os.path.realpath(file))
    allowed = [folder]
    if _cached_repo(folder) is not None:
        allowed.append(folder.parents[1] / "blobs")
    if not any(place in real.parents for place in allowed):
        raise ExportError(
            f"{file} is a link to {real}, outside the checkpoint: put the file itself there if it belongs to it."
        )
    if not file.exists():
        raise CheckpointError(f"{file} is a broken link: the download is unfinished.")
    if not file.is_file():
        raise CheckpointError(f"{file} is not a regular file: remove it, or put the file itself there.")


def _place(file: Path, target: Path, link: bool) -> None:
    """Puts the file at `target`: a hard link if asked and possible, or else a copy."""
    target.parent.mkdir(exist_ok=True)
    real = file.resolve()
    if link:
        try:
            target.hardlink_to(real)
            return
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
    shutil.copyfile(real, target)
