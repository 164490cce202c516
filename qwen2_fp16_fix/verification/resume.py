"""The finished rows of a verification in a file, so that an interrupted run can be resumed."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import VerificationError
from ..files.writing import write_whole
from .result import MeasuredRow


class FinishedRows:
    """Rows by name, written to the file after each. Without a file they are only kept in memory."""

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        """key: what the rows depend on. Raises VerificationError for a file made under another key, or unusable."""
        self.path, self.key = path, key
        self.rows: dict[str, MeasuredRow] = {}
        if path is not None:
            if path.exists():
                self.rows = self._read(path)
            self._write(path)  # before the first row, so that hours of work are not lost to a typing error

    def add(self, row: MeasuredRow) -> None:
        """Keeps a row."""
        self.rows[row.name] = row
        if self.path is not None:
            self._write(self.path)

    def _read(self, path: Path) -> dict[str, MeasuredRow]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            key, rows = found["key"], [MeasuredRow(**row) for row in found["rows"]]
            rows = [replace(row, first_differences=tuple(row.first_differences)) for row in rows]
        except (OSError, ValueError, TypeError, KeyError):
            raise VerificationError(
                f"{path} holds no finished rows of verify: delete it or name another file to resume from."
            ) from None
        for field, wanted in self.key.items():
            if not isinstance(key, dict) or key.get(field) != wanted:
                raise VerificationError(
                    f"{path} was made with another {field}: delete it or name another file to resume from."
                )
        return {row.name: row for row in rows}

    def _write(self, path: Path) -> None:
        rows = [row.to_dict() for row in self.rows.values()]
        text = json.dumps({"key": self.key, "rows": rows}, indent=2, allow_nan=False)
        wanted = "another file to resume from"
        write_whole(path, lambda part: part.write_text(text, encoding="utf-8"), wanted, VerificationError)


def digest_of(files: list[Path]) -> str:
    """SHA-256 of the files' names and whole contents: two trainings of a model have the same headers."""
    digest = hashlib.sha256()
    for file in sorted(files):
        own = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                own.update(block)
        digest.update(f"{file.name} {own.hexdigest()}\n".encode())
    return digest.hexdigest()
