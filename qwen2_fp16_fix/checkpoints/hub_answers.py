"""What the Hub or its client answers instead of a file, in one sentence."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import HubError
from ..patches.errors import Qwen2FP16FixError

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
#: What to do about an answer of the Hub.
ANSWERS = {
    401: "it refuses your token; log in again with `hf auth login`, or unset HF_TOKEN",
    403: "your token may not read it; use one with read access",
    404: "check the name, and HF_ENDPOINT",
}


@contextmanager
def one_sentence(repo: str, revision: str | None) -> Iterator[None]:
    """For a block that downloads. Turns errors of the Hub's client and of its HTTP library into a HubError.

    Their own texts have several lines, with addresses and ids. The library has changed three times.
    """
    try:
        yield
    except Qwen2FP16FixError:
        raise
    except Exception as error:
        raise HubError(f"{_what_failed(error, repo, revision)}.") from None


def _what_failed(error: Exception, repo: str, revision: str | None) -> str:
    first = root_of(error)
    if isinstance(error, GatedRepoError):
        return (
            f"{repo} is gated: ask for access at {constants.ENDPOINT}/{repo}, then log in with `hf auth login`, or set "
            "HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision}: give a branch, a tag or a commit"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no {repo} that you may see: check the name, or log in with `hf auth login`"
    status = status_of(first)
    if status is not None:
        return f"the Hub answered {status} for {repo}: {ANSWERS.get(status, 'try again later')}"
    command = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    return _without_answer(error, first, repo, command)


def _without_answer(error: Exception, first: BaseException, repo: str, command: str) -> str:
    """Of an error without the Hub's answer. command: that downloads the repository."""
    missing, there = f"{repo} is not in the Hub's cache, or not all of it", f"run `{command}` where there is a network"
    if isinstance(first, LocalTokenNotFoundError):
        return f"{repo} needs a token: log in with `hf auth login`, or set HF_TOKEN"
    if constants.HF_HUB_OFFLINE or isinstance(first, OfflineModeIsEnabled):
        variable = next((name for name in OFFLINE if os.environ.get(name)), OFFLINE[0])
        return f"{missing}, and {variable} allows no download: {there}, or unset {variable}"
    if isinstance(error, LocalEntryNotFoundError):
        return f"{missing}, and the Hub cannot be reached: {there}"
    if isinstance(first, OSError) and first.strerror and not isinstance(first, ConnectionError | TimeoutError):
        place = f"{first.filename}: " if first.filename else ""
        return f"the Hub's cache cannot be written ({place}{first.strerror}): set HF_HOME to another folder"
    return f"the download of {repo} failed ({type(first).__name__}): start it again, or run `{command}`"


def root_of(error: BaseException) -> BaseException:
    """The error that the client has wrapped into one that says less."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def status_of(error: BaseException) -> int | None:
    """The status of the Hub's answer, if the error is one."""
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None
