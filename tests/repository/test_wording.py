"""What a user reads: none of the wording that tests/repository/wording.yml lists.

The list is short: each entry was once in a README, a message or the handbook. Add a phrase when a reader stumbles.
"""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.helpers import ROOT
from tests.repository.test_layout import PACKAGE, PATCHES, modules

LIST = Path(__file__).with_name("wording.yml")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.M | re.S)  # of a page of Markdown: programs have words of their own


def pages() -> Iterator[tuple[str, str]]:
    """Every text that a user can read, with the place where it is."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), PACKAGE / "hub" / "model_card.md"]:
        yield path.relative_to(ROOT).as_posix(), CODE.sub("", path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                yield path.name, CODE.sub("", "".join(cell["source"]))
    for room in json.loads((PACKAGE / "texts" / "en.json").read_text(encoding="utf-8")).items():
        yield f"texts/en.json, {room[0]}", json.dumps(room[1], ensure_ascii=False)
    for path in (*modules(PACKAGE), *modules(PATCHES)):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                yield f"{path.relative_to(ROOT).as_posix()}:{node.lineno}", node.value


def wording() -> dict[re.Pattern[str], str]:
    """The patterns of the list, with what to write instead."""
    listed = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    return {re.compile(pattern.replace(" ", r"\s+"), re.I | re.M): better for pattern, better in listed.items()}


def test_no_listed_wording() -> None:
    patterns = wording()
    found = [
        f"{place}: {' '.join(match[0].split())!r}: write {better!r}"
        for place, text in pages()
        for pattern, better in patterns.items()
        for match in pattern.finditer(text)
    ]
    assert not found, "\n" + "\n".join(found)
