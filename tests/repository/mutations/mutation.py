"""One change of the source that a test must notice."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Mutation(NamedTuple):
    """`old`, found exactly once in `file`, becomes `new`, and `red` must fail."""

    what: str
    file: str
    old: str
    new: str
    red: str


def misplaced(mutations: Iterable[Mutation], root: Path) -> list[str]:
    """A line for each mutation that cannot be made in `root`, or that names no test of it."""
    found = []
    for each in mutations:
        test, _, function = each.red.partition("[")[0].partition("::")
        for wrong in (_misplaced_anchor(root / each.file, each.old), _missing_test(root / test, function)):
            if wrong:
                found.append(f"{each.what}: {wrong}")
    names = Counter(each.what for each in mutations)
    return found + [f"{name}: {count} mutations have this name" for name, count in names.items() if count > 1]


def _misplaced_anchor(path: Path, anchor: str) -> str:
    if not path.is_file():
        return f"there is no {path.name}"
    count = path.read_text(encoding="utf-8").count(anchor)
    return "" if count == 1 else f"{anchor!r} is not found exactly once in {path.name}, but {count} times"


def _missing_test(path: Path, function: str) -> str:
    if not path.is_file():
        return f"there is no {path.name}"
    defined = re.search(rf"^def {function}\(", path.read_text(encoding="utf-8"), re.M)
    return "" if defined else f"{path.name} defines no {function}"
