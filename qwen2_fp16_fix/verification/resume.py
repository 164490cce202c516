"""The finished rows of a verification in a file, so that an interrupted run can be resumed."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypedDict

from ..errors import VerificationError
from ..files.reading import read_json
from ..files.schema import problem
from ..files.writing import check_writable, write_whole
from ..progress import Progress, bar
from .result import MeasuredRow

WANTED = "another file to resume from"
BLOCK = 2**20  # bytes read at a time


class Saved(TypedDict):
    """The file. key: what the rows depend on."""

    key: dict[str, Any]
    rows: list[MeasuredRow]


class FinishedRows:
    """Rows by name, written to the file after each. Without a file they are only kept in memory."""

    def __init__(self, path: Path | None) -> None:
        """Raises VerificationError for a file that holds anything else, or cannot be written."""
        self.path = path
        self.rows: dict[str, MeasuredRow] = {}
        self.key: dict[str, Any] | None = None  # of the file; None without one
        if path is not None and check_writable(path, WANTED, VerificationError).exists():
            self._read(path)

    def begin(self, key: dict[str, Any]) -> None:
        """Says what the rows depend on. Raises VerificationError for a file whose rows depend on something else."""
        for field, wanted in key.items() if self.key is not None else ():
            if (self.key or {}).get(field) != wanted:
                raise VerificationError(
                    f"{self.path} was made with another {field}: delete it or name another file to resume from."
                )
        self.key = key
        self._write()

    def add(self, row: MeasuredRow) -> None:
        """Keeps a row."""
        self.rows[row.name] = row
        self._write()

    def _read(self, path: Path) -> None:
        found = read_json(path, WANTED, VerificationError)
        wrong = problem(found, Saved) or next(_impossible(found["rows"]), None)
        if wrong is not None:
            raise VerificationError(f"{path} holds no finished rows of verify ({wrong}): delete it or name {WANTED}.")
        names = [field.name for field in fields(MeasuredRow)]
        rows = [MeasuredRow(**{name: row[name] for name in names}) for row in found["rows"]]
        self.key = found["key"]
        self.rows = {row.name: _with_tuples(row) for row in rows}

    def _write(self) -> None:
        if self.path is None:
            return
        rows = [row.to_dict() for row in self.rows.values()]
        text = json.dumps({"key": self.key, "rows": rows}, indent=2, allow_nan=False)
        write_whole(self.path, lambda part: part.write_text(text, encoding="utf-8"), WANTED, VerificationError)


def _with_tuples(row: MeasuredRow) -> MeasuredRow:
    """JSON has lists."""
    return replace(row, first_differences=tuple(row.first_differences), first_margins=tuple(row.first_margins))


def _impossible(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Perplexities that no loss gives, from which no drift can be told, and differences without their margins."""
    for number, row in enumerate(rows):
        if row["perplexity"] is not None and row["perplexity"] < 1:
            yield f"rows[{number}].perplexity is {row['perplexity']}, not a number of at least 1"
        if len(row["first_differences"]) != len(row["first_margins"]):
            yield f"rows[{number}] has first_differences and first_margins of different lengths"


def digest_of(files: list[Path], progress: Progress = None) -> str:
    """SHA-256 of the files' names and whole contents: two trainings of a model have the same headers."""
    digest = hashlib.sha256()
    size = sum(-(-file.stat().st_size // BLOCK) for file in files)
    with bar("hashing the checkpoint, so that --resume can recognise it", size, progress) as shown:
        for file in sorted(files):
            own = hashlib.sha256()
            with file.open("rb") as stream:
                while block := stream.read(BLOCK):
                    own.update(block)
                    shown.advance()
            digest.update(f"{file.name} {own.hexdigest()}\n".encode())
    return digest.hexdigest()
