"""Errors around a model: of a checkpoint, a setting or a file. Errors of a model itself are in patches/errors.py.

All derive from Qwen2FP16FixError. The number is the exit code of the command line:

    Qwen2FP16FixError     3  (in patches/errors.py, which draws the rest of the tree)
    ├── CheckpointError   2
    ├── VerificationError 2
    ├── ExportError       2
    ├── PublishError      2
    ├── ScanError         2
    ├── HubError          4
    └── BrokenInstallationError 3
"""

from typing import Any

from .patches.errors import Qwen2FP16FixError


class CheckpointError(Qwen2FP16FixError):
    """A checkpoint folder is missing, empty, incomplete or unreadable."""

    exit_code = 2


class VerificationError(Qwen2FP16FixError):
    """A checkpoint cannot be verified as asked: the text, a setting, the file to resume from or the environment."""

    exit_code = 2


class ExportError(Qwen2FP16FixError):
    """A checkpoint cannot be exported as asked: the place, a link, an option, the disk or a file beside the weights."""

    exit_code = 2


class PublishError(Qwen2FP16FixError):
    """An exported folder cannot be pushed: it is not an export, the repository has other files, or the Hub refuses."""

    exit_code = 2


class ScanError(Qwen2FP16FixError):
    """A checkpoint cannot be scanned or reported on as asked: the prompts, a setting, a file or a missing extra."""

    exit_code = 2


class HubError(Qwen2FP16FixError):
    """The Hub cannot be reached, or does not give or take what was asked for: no such repository, no access."""

    exit_code = 4


class BrokenInstallationError(Qwen2FP16FixError, ImportError):
    """torch or transformers is missing, or cannot be imported."""


def quoted(value: Any) -> str:
    """A value that a file holds, as a sentence quotes it: the first 80 letters of its repr."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def first_line(error: Exception) -> str:
    """The first line of another library's error, to go into a sentence of ours; the error's class if it has no text."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
