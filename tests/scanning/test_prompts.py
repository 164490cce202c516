"""Prompts and models that a scan takes, and those that it refuses in one sentence."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import qwen2_fp16_fix
from qwen2_fp16_fix.checkpoints.loading import load
from qwen2_fp16_fix.scanning.prompts import read_prompts
from qwen2_fp16_fix.scanning.result import ScannedPrompt
from tests.scanning.planted import PROMPT, refused

pytestmark = pytest.mark.xdist_group("scan")  # one worker builds the checkpoints, for all


@pytest.mark.usefixtures("never_run")
def test_bad_prompts_and_checkpoints_are_one_sentence(folders: Callable[..., Path], tmp_path: Path) -> None:
    folder, prompts = folders("scores"), tmp_path / "prompts.json"
    assert "cannot be read (No such file" in refused(folder, "--prompts", tmp_path / "no.txt")
    for content, sentence in (
        (b"caf\xe9", "is not UTF-8"),
        (b"[", "is not valid JSON"),
        (b'{"a": 1}', "is not a list of texts"),
        (b"[]", "holds no prompt"),
        (b'["\\ud83d and \\ude00"]', "half of a surrogate pair"),
        (b'["a", " "]', "holds no prompt, or an empty one"),
    ):
        prompts.write_bytes(content)
        assert sentence in refused(folder, "--prompts", prompts)
    assert "the meta device computes nothing" in refused(folder, "--device", "meta")
    (tmp_path / "empty.txt").write_text(" \n")
    good = tmp_path / "good.txt"
    good.write_text("ABC")
    assert "holds no prompt" in refused(folder, "--prompts", tmp_path / "empty.txt")
    assert "0 tokens of a prompt leave nothing" in refused(folder, "--tokens", "0")
    assert "is not a device here" in refused(folder, "--device", "warp", "--prompts", good)
    bare = tmp_path / "bare"
    bare.mkdir()
    assert "has no config.json" in refused(bare)
    (bare / "config.json").write_text('{"model_type": "llama"}')
    assert "of type 'llama', not 'qwen2'" in refused(bare)
    (bare / "config.json").write_bytes((folder / "config.json").read_bytes())
    (bare / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert "has no tokenizer: copy tokenizer.json" in refused(bare)
    error = qwen2_fp16_fix.CheckpointError
    with pytest.raises(error, match="token 500, but the model's vocabulary ends at 127"):
        qwen2_fp16_fix.scan(bare, [[500]])
    with pytest.raises(qwen2_fp16_fix.ScanError, match="a prompt has no tokens"):
        qwen2_fp16_fix.scan(bare, [[]])
    with pytest.raises(qwen2_fp16_fix.ScanError, match="is not an attention that can be scanned"):
        qwen2_fp16_fix.scan(bare, [[5]], attention="flash")


def test_models_that_cannot_be_scanned_as_asked_are_refused(folders: Callable[..., Path]) -> None:
    error = qwen2_fp16_fix.ScanError
    model = load(folders("scores"), False, torch.float16, "eager")
    with pytest.raises(error, match=r"is stock, not as asked: call fix\(model\) first"):
        qwen2_fp16_fix.scan(model, [PROMPT], fixed=True)
    model.config._name_or_path = ""  # its folder has a tokenizer
    with pytest.raises(error, match="a text needs a tokenizer"):
        qwen2_fp16_fix.scan(model, "A")
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="this model is float32: load it in float16"):
        qwen2_fp16_fix.scan(model.float(), [PROMPT])
    with pytest.raises(qwen2_fp16_fix.NotQwen2Error):
        qwen2_fp16_fix.scan(torch.nn.Linear(2, 2), [PROMPT])


def test_a_fixed_scan_of_nothing_fixed_is_refused(
    folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN2_FP16_FIX", "0")
    with pytest.raises(qwen2_fp16_fix.ScanError, match="switches the fix off"):
        qwen2_fp16_fix.scan(folders("scores"), [PROMPT], fixed=True)


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    """Windows writes it, and it was the first token of the first prompt."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("\ufeffAB\nC".encode())
    assert read_prompts(prompts) == ["AB", "C"]


def test_texts_go_through_the_chat_template(folders: Callable[..., Path]) -> None:
    """Position 0 of a chat is where massive activations sit: a scan of bare texts would miss the real prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders("scores"))
    tokenizer.chat_template = "<{{ messages[0]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    found = qwen2_fp16_fix.scan(folders("scores"), "AB", tokenizer=tokenizer, device="cpu")
    assert found.prompts == (ScannedPrompt("AB", 4),)
    assert {site.where.token for site in found.sites} <= set("<AB>")
