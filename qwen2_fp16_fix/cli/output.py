"""The file of `--output`: checked before a command runs, so that minutes of it are not lost, and written completely."""

import json
from pathlib import Path
from typing import Any

from ..files.writing import check_writable, write_whole
from ..patches.errors import Qwen2FP16FixError

WANTED = "another file"


class OutputError(Qwen2FP16FixError):
    """The file of `--output` cannot be written."""

    exit_code = 2


def as_json_text(data: Any, escaped: bool = True) -> str:
    """JSON has no NaN and no infinity. Results have None instead; anything else raises here."""
    return json.dumps(data, indent=2, ensure_ascii=escaped, allow_nan=False)


def check_output(output: Path | None, force: bool) -> None:
    """Raises OutputError if the file cannot be written, or is there and would be overwritten."""
    if output is not None and check_writable(output, WANTED, OutputError).exists() and not force:
        raise OutputError(f"{output} exists: name another file, or add --force to overwrite it.")


def write_output(output: Path, data: dict[str, Any]) -> None:
    """Writes the data. Raises OutputError if that fails."""
    text = as_json_text(data, escaped=False) + "\n"
    write_whole(output, lambda part: part.write_text(text, encoding="utf-8"), WANTED, OutputError)
