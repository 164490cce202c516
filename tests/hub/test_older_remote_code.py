"""Code that releases up to 0.1.1 have exported stays in users' folders, and meets this release in one process."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import qwen2_fp16_fix
from qwen2_fp16_fix.hub.export import PATCHES
from qwen2_fp16_fix.patches import modeling_qwen2_fp16
from qwen2_fp16_fix.patches.version_map import NUMERICS
from tests.stress import TINY, build

RENAMED = {"on_fixed": "adopt", "on_unfixed": "release"}  # what a part is told by, now and then


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The entry file of a second copy of `patches/`, which knows the older names alone."""
    folder = tmp_path_factory.mktemp("older")
    shutil.copytree(PATCHES, folder / "exported_before", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder / "exported_before").glob("*.py"):
        text = path.read_text()
        for now, before in RENAMED.items():
            text = text.replace(now, before)
        path.write_text(text.replace(f"\nNUMERICS = {NUMERICS}\n", f"\nNUMERICS = {NUMERICS - 1}\n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("exported_before.modeling_qwen2_fp16")
    for name in [name for name in sys.modules if name.partition(".")[0] == "exported_before"]:
        del sys.modules[name]


def state(model: nn.Module) -> list[tuple[type, set[str]]]:
    """The class of each module, and the names of what is kept in it."""
    return [(type(module), set(vars(module))) for module in model.modules()]


@pytest.mark.parametrize("first", ["ours", "older"])
def test_one_copy_undoes_the_other_whole(first: str, older: Any) -> None:
    """Under `register` a model of exported code is fixed by the package first, inside its constructor."""
    fixing, undoing = (older, modeling_qwen2_fp16) if first == "older" else (modeling_qwen2_fp16, older)
    model = build(TINY, ("keys", "swiglu")).half()  # which rounds the frequencies of the rotation
    before, frequencies = state(model), model.model.rotary_emb.inv_freq.clone()
    fixing.fix_modules(model)
    assert type(model.model.norm) in fixing.STOCK_OF
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    undoing._make_stock(model)
    assert state(model) == before
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert model.model.rotary_emb.inv_freq.dtype == frequencies.dtype


def test_a_model_of_older_code_is_not_certified_by_the_exponents_of_this_one(older: Any) -> None:
    """Numerics 1 has no exponent for values: such a model was NaN, and `certify` said that it could not overflow."""
    model = build(TINY, ()).half()
    assert qwen2_fp16_fix.certify(model).proven
    older.fix_modules(model)
    found = qwen2_fp16_fix.certify(model)
    assert not found.proven
    assert f"numerics {NUMERICS - 1}" in found.reasons[0]


def test_an_older_export_is_not_certified_by_the_exponents_of_this_one(tmp_path: Path) -> None:
    """The same of its folder. A folder exported by this version is proven."""
    build(TINY, ()).half().save_pretrained(tmp_path / "plain")
    folder = qwen2_fp16_fix.export(tmp_path / "plain", tmp_path / "exported")
    assert qwen2_fp16_fix.certify(folder).proven
    path = folder / "version_map.py"
    path.write_text(path.read_text().replace(f"\nNUMERICS = {NUMERICS}\n", f"\nNUMERICS = {NUMERICS - 1}\n"))
    found = qwen2_fp16_fix.certify(folder)
    assert not found.proven
    assert f"numerics {NUMERICS - 1}" in found.reasons[0]
