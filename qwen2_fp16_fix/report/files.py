"""The files of a scan: checked before the run, so that minutes of it are not lost, and written completely."""

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ScanError
from ..files.writing import check_writable, write_whole
from ..scanning.result import ScanResult
from ..scanning.scan import check_switch, scan
from ..verification.saved import read_saved

#: The packages of the extra `report` that each kind of file needs.
NEEDS = {"report": ("matplotlib", "jinja2"), "png": ("matplotlib",)}


class Asked(NamedTuple):
    """What the caller wrote to ask for a file, as messages repeat it."""

    report: str
    png: str
    force: str


BY_COMMAND = Asked("--report", "--png", "--force")
BY_METHOD = Asked("save_html", "save_png", "force=True")


@dataclass(frozen=True)
class ScanFiles:
    """The files that a scan is to write; None for a file that is not asked for."""

    report: Path | None = None
    json: Path | None = None
    png: Path | None = None
    verification: Path | None = None
    lang: str = "en"
    asked: Asked = BY_COMMAND

    def check(self, force: bool) -> dict[str, Any] | None:
        """The result of `verify`, if a file with one is named. Raises ScanError if a file would fail after the run."""
        asked = {"report": self.report, "json": self.json, "png": self.png}
        named = {kind: path for kind, path in asked.items() if path is not None}
        if len({os.path.realpath(path) for path in named.values()}) < len(named):
            raise ScanError("two of the files asked for have the same name: give each its own.")
        for kind, path in named.items():
            self._check_extra(kind)
            self._check_path(path, force)
        if self.png is not None:
            from .drawing import fonts

            fonts(self.lang)
        if self.verification is None:
            return None
        if self.report is None:
            raise ScanError("a verification goes into a report: add --report OUT.html.")
        return read_saved(self.verification, ScanError)

    def write(self, scans: Sequence[ScanResult], verification: dict[str, Any] | None) -> list[Path]:
        """Writes the files that were asked for and returns their paths. scans: stock's, fixed's, or both."""
        written: list[Path] = []
        if self.json is not None:
            text = json.dumps(as_data(scans), indent=2, allow_nan=False, ensure_ascii=False)
            written.append(_write(self.json, lambda part: part.write_text(text + "\n", encoding="utf-8")))
        if self.report is not None:
            from .page import page

            html = page(scans, verification, self.lang)
            written.append(_write(self.report, lambda part: part.write_text(html, encoding="utf-8")))
        if self.png is not None:
            from .picture import draw

            written.append(_write(self.png, lambda part: draw(scans, part, self.lang)))
        return written

    def _check_extra(self, kind: str) -> None:
        missing = [name for name in NEEDS.get(kind, ()) if importlib.util.find_spec(name) is None]
        if missing:
            raise ScanError(
                f'{getattr(self.asked, kind)} needs {" and ".join(missing)}: run pip install "qwen2-fp16-fix[report]".'
            )

    def _check_path(self, path: Path, force: bool) -> None:
        """Raises ScanError if the file cannot be written, or would be overwritten."""
        file = check_writable(path, "another file", ScanError)
        if file.exists() and not force:
            raise ScanError(f"{path} exists: name another file, or add {self.asked.force} to overwrite it.")


def scan_to_files(
    path: str | Path,
    files: ScanFiles,
    *,
    fixed: bool | None,
    force: bool,
    wrote: Callable[[Path], object],
    show: Callable[[list[ScanResult]], object],
    **options: Any,
) -> list[ScanResult]:
    """Runs the command `scan`: checks the files, scans, writes the files, shows the scans and returns them.

    fixed: which model; None for stock, or for both if there is a report or a picture. force: overwrite files.
    wrote: is called with each path that was written. show: is called with the scans, also where writing failed.
    options: of `scan`.
    Raises what `scan` raises, and ScanError for the files.
    """
    verification = files.check(force)
    both = fixed is None and (files.report is not None or files.png is not None)
    if both or fixed:
        check_switch()  # before stock runs
    found = [scan(path, fixed=wanted, **options) for wanted in ((False, True) if both else (bool(fixed),))]
    try:
        for written in files.write(found, verification):
            wrote(written)
    finally:  # a scan takes minutes: it is shown even if it cannot be written
        show(found)
    return found


def as_data(scans: Sequence[ScanResult]) -> dict[str, Any]:
    """Scans as plain data, by the model that each is of."""
    return {"fixed" if scan.settings.fixed else "stock": scan.to_dict() for scan in scans}


def save(found: ScanResult, verification: dict[str, Any] | None, force: bool, **paths: Any) -> None:
    """Writes one file of one scan. paths: fields of ScanFiles. Raises ScanError if it cannot be written."""
    files = ScanFiles(asked=BY_METHOD, **paths)
    files.check(force)
    files.write([found], verification)


def _write(path: Path, make: Callable[[Path], object]) -> Path:
    write_whole(path, make, "another file", ScanError)
    return path
