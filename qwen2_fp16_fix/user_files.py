"""Text files that a user names: read whole, or refused in one sentence."""

from pathlib import Path

from .patches.errors import Qwen2FP16FixError


def read_utf8(path: Path, wanted: str, refusal: type[Qwen2FP16FixError]) -> str:
    """The text of a file. wanted: what it should be, with its article. Raises `refusal` where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise refusal(f"{path} is not UTF-8: convert it, or name another file.") from None
    except OSError as error:
        raise refusal(f"{path} cannot be read ({error.strerror}): name {wanted}.") from None
