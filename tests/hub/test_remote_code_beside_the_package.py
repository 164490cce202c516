"""A model of remote code is known to the installed package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qwen2_fp16_fix
from benchmarks.workloads import CACHE
from qwen2_fp16_fix.demo import CHECKPOINT
from qwen2_fp16_fix.patches.errors import PatchConflictError
from tests.stress import TINY, build, random_prompt


@pytest.fixture
def remote(tmp_path: Path) -> Any:
    """A strict export loaded as remote code, with its attention and its weights as ever."""
    out = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "remote", strict=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        out, trust_remote_code=True, dtype=torch.float16, attn_implementation="eager"
    ).eval()


def test_certify_knows_the_linears_of_remote_code(remote: Any) -> None:
    assert qwen2_fp16_fix.certify(remote).proven


def test_errors_of_remote_code_are_the_packages(remote: Any) -> None:
    """Its error classes are its own, and `except PatchConflictError` would miss them."""
    remote.model.norm = torch.nn.Identity()
    for act in (qwen2_fp16_fix.fix, qwen2_fp16_fix.unfix):
        with pytest.raises(PatchConflictError, match="norm is a torch"):
            act(remote)
    found = qwen2_fp16_fix.status(remote).model
    assert not found.fixed
    assert "another tool" in found.problem


def test_remote_code_obeys_the_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_FP16_FIX", "0")
    out = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "off")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    found = qwen2_fp16_fix.status(model).model
    assert (found.fixed, found.code) == (False, None)


RUN = """
import sys, torch, transformers
import qwen2_fp16_fix
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float16, attn_implementation="eager"
    )
    found = qwen2_fp16_fix.status(model).model
    exponents = {layer.mlp for layer in found.ranges}
    finite = bool(torch.isfinite(model(torch.arange(20)[None]).logits).all())
    print(found.fixed, found.code, "by token" in exponents, finite)
"""


@pytest.mark.process
def test_run_and_remote_code_go_together(tmp_path: Path, python: Callable[..., Any]) -> None:
    """`run` gives the fixed classes stock's names, and remote code that builds on those found them patched."""
    folders = [qwen2_fp16_fix.export(CHECKPOINT, tmp_path / str(s), strict=s) for s in (False, True)]
    (tmp_path / "script.py").write_text(RUN)
    arguments = ["-m", "qwen2_fp16_fix", "run", "--", "python", str(tmp_path / "script.py"), *map(str, folders)]
    done = python(*arguments)
    assert done.returncode == 0, done.stderr
    plain, strict = done.stdout.splitlines()[-2:]
    assert plain in ("True package False True", "True remote False True")  # by release
    assert strict == "True remote False True"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_remote_code_stores_keys_in_two_parts(attention: str, tmp_path: Path) -> None:
    """To the bit as the package does, and in its caches: either goes on with those of the other."""
    build(TINY, ("keys_fast",)).half().save_pretrained(tmp_path / "spiked")
    out = qwen2_fp16_fix.export(tmp_path / "spiked", tmp_path / "out")
    load = transformers.AutoModelForCausalLM.from_pretrained
    chosen = {"dtype": torch.float16, "attn_implementation": attention}
    remote = load(out, trust_remote_code=True, **chosen).eval()
    ours = qwen2_fp16_fix.fix(load(tmp_path / "spiked", **chosen).eval())
    tokens, cache = random_prompt(TINY, batch=1, length=40), transformers.DynamicCache()
    with torch.no_grad():
        assert torch.equal(remote(tokens).logits, ours(tokens).logits)
        remote(tokens[:, :30], **{CACHE: cache})
        assert cache.layers[0].keys.shape[-1] == TINY.head_dim + 8
        ours(tokens[:, 30:], **{CACHE: cache})
    assert [row.pairs_in_two_parts for row in qwen2_fp16_fix.status(remote).model.ranges] == [2, 0, 0, 2]
