"""The model card says what was exported, measured and licensed, and nothing private."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import qwen2_fp16_fix
from qwen2_fp16_fix.demo import CHECKPOINT
from qwen2_fp16_fix.errors import ExportError
from qwen2_fp16_fix.hub import model_card


def findings() -> dict[str, Any]:
    """As `verify` returns them; tests/test_verify.py holds its real answer against the card."""
    row = {"dtype": "float16", "fixed": True, "finite": True, "perplexity": 18.8372, "kl_mean": 1.2e-6, "kl_max": 9e-5}
    row |= {"drift": 1e-5, "largest_logit_difference": 0.1, "first_overflow": None}
    broken = {"finite": False, "perplexity": None, "kl_mean": None, "kl_max": None, "top1_agreement": None}
    return {
        "versions": {"transformers": "5.0.0", "torch": "2.13.0"},
        "checkpoint": "demo",
        "settings": {"tokens": 4096, "window": 1024, "device": "cpu"},
        "rows": [row | {"name": "fixed float16 eager", "top1_agreement": 0.9987}, row | broken | {"name": "stock"}],
        "verdict": "Verified: all of it.",
    }


def test_the_card_says_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "verify.json"
    file.write_text(json.dumps(findings()))
    for number, given in enumerate((findings(), file, str(file))):
        out = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / str(number), weights="none", verification=given)
        card = (out / "README.md").read_text()
        assert "| fixed float16 eager | 18.8372 | 1.2e-06 | 9.0e-05 | 0.9987 |" in card
        assert "| stock | NaN | NaN | NaN | NaN |" in card
        assert "Verified: all of it." in card
    assert "Not measured" in (qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "plain") / "README.md").read_text()


def test_the_card_vouches_for_no_device() -> None:
    """It named cards that no test has run on; what `verify` measured says where by itself."""
    assert not re.search(r"V100|T4|GPU|CUDA|\bcards?\b", model_card.CARD)


@pytest.mark.parametrize("place", ["/home/jane-doe/qwen2", "C:\\Users\\jane-doe\\qwen2", "../jane-doe/qwen2/"])
def test_the_card_does_not_say_where_it_was_measured(place: str, tmp_path: Path) -> None:
    """`push` publishes the card, and `verify` prints the path that it was given."""
    measured = findings() | {"checkpoint": place}
    out = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out", weights="none", verification=measured)
    card = (out / "README.md").read_text()
    assert "jane-doe" not in card
    assert "verify` on `qwen2`, against" in card


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps(findings() | {"rows": []}), '{"rows": [{"name": 1}]}'])
def test_another_file_is_no_verification(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ExportError, match="verify PATH --json"):
        qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out", verification=tmp_path / "file")
    with pytest.raises(ExportError, match="cannot be read"):
        qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out", verification=tmp_path / "nothing")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlicense: other\nlicense_name: mine\nlanguage: [en, zh]\n---\n"}, ("other", "mine")),
        ({"LICENSE": "\n      Apache License\n   Version 2.0"}, ("apache-2.0", None)),
        ({"LICENSE": "Qwen RESEARCH LICENSE AGREEMENT"}, ("other", "qwen-research")),
        ({"LICENSE": "Tongyi Qianwen LICENSE AGREEMENT"}, ("other", "tongyi-qianwen")),
        ({"LICENSE": "All rights reserved."}, ("other", None)),
        ({"README.md": "---\ntags: [a]\n---\n", "LICENSE": "Qwen LICENSE AGREEMENT"}, ("other", "qwen")),
        ({}, (None, None)),
    ],
)
def test_the_card_carries_the_licence(
    files: dict[str, str], licence: tuple[str | None, str | None], checkpoint: Path, tmp_path: Path
) -> None:
    for name, text in files.items():
        (checkpoint / name).write_text(text)
    out = qwen2_fp16_fix.export(checkpoint, tmp_path / "out", weights="none")
    data = ModelCard.load(out / "README.md").data
    assert (data.license, data.get("license_name")) == licence
    if "language" in files.get("README.md", ""):
        assert data.language == ["en", "zh"]
    text = (out / "README.md").read_text()
    assert (licence[1] or licence[0] or "do not\nstate") in text


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("code_repo", [None, "some/code"])
def test_the_code_in_the_card_is_python(strict: bool, code_repo: str | None, tmp_path: Path) -> None:
    out = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out", strict=strict, code_repo=code_repo)
    text = (out / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    compile(block, "card", "exec")
    assert "trust_remote_code=True" in block
    assert ("code_revision=" in block) == (code_repo is not None)
    assert ("refuse to load" in text) == strict
    assert ("silently builds its own Qwen2" in text) == (not strict)
    assert ModelCard.load(out / "README.md").data.pipeline_tag == "text-generation"
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) < 140
    assert model_card.TASKS.keys() == {end for end, _ in heads_of_the_auto_classes()}


def heads_of_the_auto_classes() -> Any:
    from qwen2_fp16_fix.hub.export_config import AUTO_CLASSES

    return AUTO_CLASSES.values()
