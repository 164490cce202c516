"""Files that a user names: read whole and written whole, or refused in one sentence."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .patches.errors import Qwen2FP16FixError


def read_utf8(path: Path, wanted: str, refusal: type[Qwen2FP16FixError]) -> str:
    """The text of a file. wanted: what it should be, with its article. Raises `refusal` where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")  # the mark that Windows begins a text with is no part of it
    except UnicodeDecodeError:
        raise refusal(f"{path} is not UTF-8: convert it, or name another file.") from None
    except OSError as error:
        raise refusal(f"{path} cannot be read ({error.strerror}): name {wanted}.") from None


def write_whole(path: Path, make: Callable[[Path], object], wanted: str, refusal: type[Qwen2FP16FixError]) -> None:
    """Has `make` write a file beside `path` and renames it: what is there is whole at every moment.

    wanted: what to name instead where it cannot be written, which raises `refusal`.
    """
    part = path.with_name(f".qwen2-fp16-fix-{os.getpid()}.part")  # however long the name of the file is
    try:
        make(part)
        part.replace(path)
    except OSError as error:
        raise refusal(f"{path} cannot be written ({error.strerror}): name {wanted}.") from None
    finally:
        with suppress(OSError):  # where it could not be made, it cannot be removed either
            part.unlink()
