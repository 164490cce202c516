"""The range modules: one for each range of the version map, none missing, none built upon another."""

import ast
import importlib
import re
from itertools import pairwise
from types import ModuleType

import pytest
from packaging.specifiers import SpecifierSet

from qwen2_fp16_fix.patches import blocks, modeling_qwen2_fp16, version_map
from qwen2_fp16_fix.patches.lock import HERE
from qwen2_fp16_fix.patches.version_map import DIFFERENCES, RANGES

FILES = sorted(path.stem for path in HERE.glob("v[0-9]*.py"))
MODULES = [each.module for each in RANGES]


def loaded(name: str) -> ModuleType:
    return importlib.import_module(f"{version_map.__package__}.{name}")


def classes_of(name: str) -> list[type]:
    """The classes that a module defines."""
    module = loaded(name)
    return [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]


def test_each_range_has_one_module_and_each_module_one_range() -> None:
    assert sorted(MODULES) == FILES
    assert list(DIFFERENCES) == MODULES


def test_the_ranges_leave_no_gap_and_do_not_overlap() -> None:
    """A release between two ranges would be refused, and one in two would be served by the older module."""
    ends = [re.fullmatch(r">=([\d.]+)(?:,<([\d.]+))?", each.requirement) for each in RANGES]
    assert all(ends)
    for each, following in pairwise(ends):
        assert each is not None
        assert following is not None
        assert each[2] == following[1]
    assert ends[-1] is not None
    assert ends[-1][2] is None
    assert version_map.NEWEST_TESTED in SpecifierSet(RANGES[-1].requirement)


def test_the_entry_file_chooses_among_all_of_them() -> None:
    entry = (HERE / "modeling_qwen2_fp16.py").read_text()
    chosen = dict(re.findall(r'^    "(v\w+)": PARTS_(\w+),$', entry, re.M))
    assert chosen == {name: name.removeprefix("v") for name in MODULES}
    assert loaded(modeling_qwen2_fp16.RANGE.module).PARTS is modeling_qwen2_fp16.PARTS


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_complete(name: str) -> None:
    """Every part that `swap` looks for, each with the shape that `structure` compares with stock's."""
    parts = loaded(name).PARTS
    assert {*blocks.COMMON_PARTS, "Qwen2Attention"} <= {*parts}
    for part in parts.values():
        assert isinstance(part.stock_parameters, tuple)
        assert isinstance(part.stock_names, set)
        assert "forward" in {
            attribute
            for kind in part.__mro__
            if kind.__module__ != "torch.nn.modules.module"
            for attribute in vars(kind)
        }
    assert DIFFERENCES[name].cache_argument in parts["Qwen2Attention"].stock_parameters
    assert ("Qwen2SdpaAttention" in parts) is (DIFFERENCES[name].backends == "classes")


@pytest.mark.parametrize("name", MODULES)
def test_a_module_states_its_attention_whole(name: str) -> None:
    """Who changes one range must not change another, and an engine that reads one forward must find all of it there."""
    tree = ast.parse((HERE / f"{name}.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
    }
    assert not imported & set(FILES)
    own = loaded(name).__name__
    others = {loaded(other).__name__ for other in MODULES} - {own}
    for kind in classes_of(name):
        assert not {base.__module__ for base in kind.__mro__} & others
    assert loaded(name).PARTS["Qwen2Attention"].forward.__module__ == own
