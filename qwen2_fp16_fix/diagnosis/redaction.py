"""Takes what is private out of a report that people paste into public issues: folders, user names in them, tokens."""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ABSOLUTE = re.compile(r"(?<![\w/.:\\])(?:~|[A-Za-z]:)?[/\\]{1,2}[^\s'\"<>|,;:()]*[^\s'\"<>|,;:().]")
TOKEN = re.compile(r"\b(?:hf|sk|gh[a-z])[_-]\w{8,}")


def redact(tree: Any, places: Mapping[str, str]) -> Any:
    """`tree`, JSON-fit data, with every string redacted: `places` by the name each has, other absolute paths as "…"."""
    if isinstance(tree, str):
        return _redact_text(tree, places)
    if isinstance(tree, dict):
        return {_redact_text(key, places): redact(value, places) for key, value in tree.items()}
    if isinstance(tree, list):
        return [redact(value, places) for value in tree]
    return tree


def private_places(path: Path | None) -> dict[str, str]:
    """Folders of this machine, longest first, and what to call them. The checkpoint at `path` is PATH."""
    found = {str(Path.home()): "~", os.getcwd(): ".", sys.prefix: "…"}
    if path is not None:
        folder = path if path.is_dir() else path.parent
        for spelled in (folder, folder.absolute(), folder.resolve()):
            found[str(spelled)] = "PATH"
    usable = {place: name for place, name in found.items() if len(Path(place).parts) > 1}  # "/" and "." are no secrets
    return dict(sorted(usable.items(), key=lambda item: -len(item[0])))


def _redact_text(text: str, places: Mapping[str, str]) -> str:
    for place, name in places.items():
        text = text.replace(place, name)
    return TOKEN.sub("…", ABSOLUTE.sub(_keep_what_is_named, text))


def _keep_what_is_named(found: re.Match[str]) -> str:
    """A path below one that has been named already ("~/x", "PATH/x") loses what is below, others everything."""
    return "~" if found[0].startswith("~") else "…"
