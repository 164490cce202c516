"""Removes private data from a report that people paste into public issues: folders, with user names, and tokens."""

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..checkpoints.hub_ids import parse_id
from ..results import Record

ABSOLUTE = re.compile(r"(?<![\w/.:\\])(?:~|[A-Za-z]:)?[/\\]{1,2}[^\s'\"<>|,;:()]*[^\s'\"<>|,;:().]")
COMMAND = re.compile(r"(qwen2-fp16-fix \w+) PATH\b")
TOKEN = re.compile(r"\b(?:hf|sk|gh[a-z])[_-]\w{8,}")


def redact(tree: Any, places: Mapping[str, str]) -> Any:
    """`tree` with every string in it redacted: a place in `places` by its name there, other absolute paths as "…".

    tree: a result, or plain data as in JSON.
    """
    if isinstance(tree, str):
        return _redact_text(tree, places)
    if isinstance(tree, dict):
        return {_redact_text(key, places): redact(value, places) for key, value in tree.items()}
    if isinstance(tree, list):
        return [redact(value, places) for value in tree]
    if isinstance(tree, Record):
        found = {field.name: getattr(tree, field.name) for field in fields(tree)}  # type: ignore[arg-type]  # a dataclass
        return replace(tree, **redact(found, places))  # type: ignore[type-var]
    return tree


def python_name(given: str | os.PathLike[str]) -> str:
    """The user's own name of a checkpoint as the arguments of from_pretrained."""
    asked = parse_id(given)
    names = [str(given)] if asked is None or asked.revision is None else list(asked)
    return ", revision=".join(json.dumps(name, ensure_ascii=False) for name in names)


def fill_in(tree: Any, given: str | os.PathLike[str]) -> Any:
    """`tree` with the user's own name of the checkpoint in place of PATH, in lines of Python and in commands only."""
    if isinstance(tree, str):
        named = tree.replace('"PATH"', python_name(given))
        return COMMAND.sub(lambda found: f"{found[1]} {shlex.quote(str(given))}", named)
    if isinstance(tree, list):
        return [fill_in(value, given) for value in tree]
    if isinstance(tree, Record):
        found = {field.name: fill_in(getattr(tree, field.name), given) for field in fields(tree)}  # type: ignore[arg-type]
        return replace(tree, **found)  # type: ignore[type-var]
    return tree


def private_places(path: Path | None) -> dict[str, str]:
    """Folders of this machine and the name of each in a report, longest first. The checkpoint at `path` is PATH."""
    found = {str(Path.home()): "~", os.getcwd(): ".", sys.prefix: "…"}
    if path is not None:
        folder = path if path.is_dir() else path.parent
        for spelled in (folder, folder.absolute(), folder.resolve()):
            found[str(spelled)] = "PATH"
    usable = {place: name for place, name in found.items() if len(Path(place).parts) > 1}  # "/" and "." are not private
    return dict(sorted(usable.items(), key=lambda item: -len(item[0])))


def _redact_text(text: str, places: Mapping[str, str]) -> str:
    for place, name in places.items():
        text = text.replace(place, name)
    return TOKEN.sub("…", ABSOLUTE.sub(_placeholder, text))


def _placeholder(found: re.Match[str]) -> str:
    """A path below the home folder becomes "~", every other path "…"."""
    return "~" if found[0].startswith("~") else "…"
