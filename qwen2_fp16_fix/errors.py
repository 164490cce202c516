"""What can go wrong around a model: a checkpoint, a setting, a file. What can go wrong in one is in `patches/`."""

from .patches.errors import Qwen2FP16FixError


class CheckpointError(Qwen2FP16FixError):
    """A checkpoint folder is missing, empty, incomplete or unreadable."""


class VerificationError(Qwen2FP16FixError):
    """A checkpoint cannot be verified as asked: the text, a setting, the file to resume from or the environment."""


class ExportError(Qwen2FP16FixError):
    """A checkpoint cannot be exported as asked: the place, a link, an option, the disk or a file beside the weights."""


class PublishError(Qwen2FP16FixError):
    """An exported folder cannot be pushed: it is no export, the repository is another's, or the Hub refuses."""


class ScanError(Qwen2FP16FixError):
    """A checkpoint cannot be scanned or reported on as asked: the prompts, a setting, a file or a missing extra."""
