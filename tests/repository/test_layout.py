"""How the source is laid out: files and rooms of a size one can take in, and a line in the handbook for each file."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tools import draw_rooms

PACKAGE, PATCHES = ROOT / "qwen2_fp16_fix", ROOT / "patches"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
LINES = {"qwen2_fp16_fix": 300, "patches": 300, "tools": 300, "benchmarks": 300, "tests": 500}
MODULES = 12


def modules(folder: Path) -> Iterator[Path]:
    """The Python files in a folder and below; patches/ once, not through the package's link to it."""
    for path in sorted(folder.rglob("*.py")):
        if not path.is_relative_to(PACKAGE / "patches") and "__pycache__" not in path.parts:
            yield path


@pytest.mark.parametrize(("folder", "limit"), LINES.items(), ids=LINES)
def test_no_file_is_too_long(folder: str, limit: int) -> None:
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_bytes().splitlines()) for path in modules(ROOT / folder)}
    assert {name: count for name, count in lines.items() if count > limit} == {}


def test_no_room_is_too_full() -> None:
    """Fifty modules lay side by side once. Public modules count; patches/ is flat, since remote code must be."""
    rooms = Counter(path.parent.relative_to(ROOT) for path in modules(PACKAGE) if not path.name.startswith("_"))
    assert {str(room): count for room, count in rooms.items() if count > MODULES} == {}


def test_every_file_has_a_line_in_the_handbook() -> None:
    """And every line its file: the map named modules that had moved."""
    named = re.findall(r"^\| `([\w./]+\.py)` \|", ARCHITECTURE.read_text(encoding="utf-8"), re.M)
    here = {path.relative_to(PACKAGE).as_posix() for path in modules(PACKAGE)}
    here -= {name for name in here if name.endswith("/__init__.py")}  # a room's holds one docstring
    here |= {path.relative_to(ROOT).as_posix() for path in modules(PATCHES)}
    assert (set(named) - here, here - set(named)) == (set(), set())
    assert len(named) == len(set(named))


def test_a_rooms_init_holds_one_docstring() -> None:
    """So that what a name is and where it is found is one question."""
    for path in PACKAGE.glob("*/__init__.py"):
        if path.parent.name != "patches":
            assert re.fullmatch(r'"""[^"]+"""\n', path.read_text(encoding="utf-8")), path.parent.name


def test_the_picture_shows_the_rooms() -> None:
    assert draw_rooms.main(["--check"]) == 0, "run `make docs`"


def test_the_example_of_a_command_is_the_command() -> None:
    """The recipe shows code to copy. The code that it shows had changed, and a copy of it wrapped long lines."""
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```\n(def .*?)```$", page, re.M | re.S)
    assert example in (PACKAGE / "cli" / "checks.py").read_text(encoding="utf-8")
