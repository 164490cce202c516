"""Pushes an exported folder to the Hub, in one commit. Large weights are pushed first, in a commit of their own.

The Hub keeps files that have arrived, so an interrupted push continues where it stopped. The files that make weights
loadable come last. The token is left to the Hub's client: nothing here reads, passes or prints it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from rich.console import Group
from rich.text import Text

from .._version import __version__
from ..checkpoints.config import builds_own_model, reachable, read_config
from ..checkpoints.folder import FolderSource
from ..checkpoints.hub_answers import status_of
from ..checkpoints.hub_ids import is_repo_id
from ..errors import CheckpointError, HubError, PublishError
from ..files.reading import read_json, to_path
from ..locking import FILE_NAME as LOCK
from ..patches.errors import LockFileError
from ..patches.lock_file import read_lock
from ..patches.version_map import SUPPORTED
from .export import CODE_FILES
from .export_config import has_own_code, heads_to_check

WEIGHTS = "*.safetensors"
MARK = "Pushed by qwen2-fp16-fix."  # marks our commits, so that a resumed push recognises its own repository
LARGE = 5 * 10**9  # bytes of weights; from here on an upload takes long enough to be interrupted
#: The Hub's own error derives from those of its HTTP library, which has changed twice.
NETWORK_ERRORS: Any = (OSError, *HfHubHTTPError.__bases__)
#: Files transformers would still load from an older push. Deleted if this export lacks them.
LOADED = (WEIGHTS, "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.py", "adapter_config.json", LOCK)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    api: HfApi | None = None,
) -> dict[str, Any]:
    """Uploads an exported folder to a model repository of the Hub, which is created if there is none.

    Args:
        folder: What `export` has written.
        repo_id: OWNER/NAME.
        private: Whether a new repository is private. An existing one is not changed.
        revision: A branch, created if it is missing; by default main.
        message: The message of the commit; by default it names the versions.
        dry_run: Whether to only check the folder and list its files, without the network.
        overwrite: Whether to push into a repository that holds something other than an export as well.
        api: The HfApi to upload with; by default one with this machine's login.

    Returns:
        Plain data: `repo`, `revision`, `private`, `message`, `files` (each with `path` and `bytes`), `deleted` (files
        of an earlier push that would still be loaded) and `commit` (its URL; None for a dry run).

    Raises:
        CheckpointError: The folder is missing, incomplete or damaged.
        NotQwen2Error: The folder does not hold a Qwen2.
        HubError: The Hub cannot be reached, or refuses.
        PublishError: Anything else: the folder is not an export, or the repository holds something else.
    """
    folder = to_path(folder, CheckpointError)
    files = check_export(folder)
    if not is_repo_id(repo_id):
        raise PublishError(f"{repo_id!r} is not a repository: give OWNER/NAME.")
    found: dict[str, Any] = {
        "repo": repo_id,
        "revision": revision or "main",
        "private": private,
        "message": message or commit_message(folder),
        "files": [{"path": path, "bytes": (folder / path).stat().st_size} for path in files],
        "deleted": [],
        "commit": None,
    }
    if dry_run:
        return found
    with _one_sentence(repo_id):
        return found | _upload(api or HfApi(), folder, files, found, overwrite)


def check_export(folder: Path) -> list[str]:
    """The paths of the folder's files. Raises PublishError unless it is an export, and whole."""
    with reachable(folder):
        found = folder.is_dir()
    if not found:
        raise CheckpointError(f"there is no folder {folder}: give one that `qwen2-fp16-fix export` has written.")
    config = read_config(folder)
    if not builds_own_model(config):
        raise PublishError(f"{folder} is not an export: run `qwen2-fp16-fix export` first, and push what it writes.")
    missing = [name for name in CODE_FILES if not (folder / name).is_file()] if has_own_code(config) else []
    if missing:
        raise PublishError(f"{folder} lacks {', '.join(missing)}: export the checkpoint again.")
    if any(folder.glob(WEIGHTS)) or any(folder.glob("*.safetensors.index.json")):
        source = FolderSource(folder)
        for head in heads_to_check(config):
            source.check_complete(head)
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path.as_posix() for path in paths if not any(_is_hidden(part) for part in path.parts)]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def commit_message(folder: Path) -> str:
    """The message of the commit, with the versions that decide the numbers. Raises PublishError for a broken lock."""
    known = ""
    if (folder / LOCK).is_file():
        try:
            known = f", numerics {read_lock(folder / LOCK)['numerics']}"
        except LockFileError:
            raise PublishError(
                f"{folder} has a {LOCK} that this version cannot read: export the checkpoint again."
            ) from None
    return f"Export with qwen2-fp16-fix {__version__}{known}, for {SUPPORTED}"


def _upload(api: HfApi, folder: Path, files: list[str], plan: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """Checks the repository, makes it if there is none, and uploads."""
    repo, revision = plan["repo"], plan["revision"]
    stale = [path for path in _remote_files(api, repo, revision, overwrite) if path not in files and _is_loaded(path)]
    api.create_repo(repo, private=plan["private"], exist_ok=True)
    if revision != "main":
        api.create_branch(repo, branch=revision, exist_ok=True)
    where: dict[str, Any] = {"repo_id": repo, "folder_path": str(folder), "revision": revision}
    where["commit_description"] = MARK
    if sum(file["bytes"] for file in plan["files"] if fnmatch(file["path"], WEIGHTS)) >= LARGE:
        api.upload_folder(**where, allow_patterns=[WEIGHTS], commit_message=f"{plan['message']}: weights")
        files = [path for path in files if not fnmatch(path, WEIGHTS)]
    done = api.upload_folder(**where, allow_patterns=files, delete_patterns=stale, commit_message=plan["message"])
    return {"deleted": stale, "commit": str(getattr(done, "commit_url", done))}


def _remote_files(api: HfApi, repo: str, revision: str, overwrite: bool) -> list[str]:
    """The files of the repository, if there is one. Raises PublishError if it holds something other than an export."""
    if not api.repo_exists(repo):
        return []
    branches = {branch.name for branch in api.list_repo_refs(repo).branches}
    where = revision if revision in branches else None  # a new branch starts as a copy of the main one
    files = list(api.list_repo_files(repo, revision=where))
    foreign = [path for path in files if path != ".gitattributes"]  # the Hub makes that one itself
    if foreign and not overwrite and not _is_ours(api, repo, where, files):
        raise PublishError(
            f"{repo} exists and holds something else ({', '.join(foreign[:3])}): name another repository, or use "
            "--overwrite."
        )
    return files


def _is_ours(api: HfApi, repo: str, revision: str | None, files: list[str]) -> bool:
    """Whether the repository holds an export or part of one: by its lock, its last commit, or its config.json."""
    last = next(iter(api.list_repo_commits(repo, revision=revision)), None)
    if LOCK in files or (last is not None and MARK in f"{last.title} {last.message}"):
        return True
    if "config.json" not in files:
        return False
    file = Path(api.hf_hub_download(repo, "config.json", revision=revision))
    try:
        config = read_json(file, "another repository", PublishError)
    except PublishError:
        return False
    return builds_own_model(config)


def _is_loaded(path: str) -> bool:
    return "/" not in path and any(fnmatch(path, pattern) for pattern in LOADED)


@contextmanager
def _one_sentence(repo: str) -> Iterator[None]:
    """Turns errors of the Hub and the network into one sentence. Their own texts hold URLs and request ids."""
    try:
        yield
    except HfHubHTTPError as error:
        raise HubError(_answer(repo, status_of(error))) from None
    except OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE=1 keeps the Hub's client offline: unset it to push.") from None
    except LocalTokenNotFoundError:
        raise HubError(_answer(repo, 401)) from None
    except NETWORK_ERRORS as error:
        raise HubError(
            f"{repo} could not be reached ({type(error).__name__}): nothing more was pushed; push again to continue."
        ) from None


def _answer(repo: str, status: int | None) -> str:
    if status == 401:
        return f"the Hub does not know who pushes to {repo}: log in with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return f"your token may not write to {repo}: use one with write access, or a repository of your own."
    if status == 404:
        return f"the Hub has no {repo} that you may see: check the name and your access."
    if status in (409, 412):
        return f"{repo} has changed meanwhile: push again."
    return f"the Hub answered {status} for {repo}: nothing more was pushed; push again later to continue."


def as_table(found: dict[str, Any]) -> Group:
    """The files that were or would be pushed, and their destination, for a terminal."""
    lines = [f"{file['bytes']:>14,}  {file['path']}" for file in found["files"]]
    lines += [f"{'deleted':>14}  {path}" for path in found["deleted"]]
    size = sum(file["bytes"] for file in found["files"])
    text = f"{len(found['files'])} files, {size:,} bytes, {'private' if found['private'] else 'public'} if new"
    where = f"{found['repo']} at {found['revision']}"
    verb = f"would go to {where}" if found["commit"] is None else f"are at {where}: {found['commit']}"
    return Group(*map(Text, [*lines, f"{text}, {verb} ({found['message']})"]))
