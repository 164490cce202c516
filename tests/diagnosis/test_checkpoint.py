"""The doctor says what a checkpoint is, and what is wrong with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen2_fp16_fix
from qwen2_fp16_fix.demo import CHECKPOINT
from qwen2_fp16_fix.diagnosis import checkpoint, remarks, self_test
from qwen2_fp16_fix.translations import DOCTOR_TEXTS
from tests.diagnosis.examples import codes, copy_of_demo, replace_tensors


def examine(path: Path) -> tuple[dict[str, Any], list[str], list[str]]:
    """The facts of a checkpoint and the codes of its notes and problems, each of which has words in both languages."""
    facts, notes, problems = checkpoint.examine(path)
    for remark in (*notes, *problems):
        assert all(remarks.in_words(remark, language) for language in DOCTOR_TEXTS)
    return facts, [note.code for note in notes], [problem.code for problem in problems]


def test_a_plain_checkpoint_is_described_and_proven() -> None:
    facts, notes, problems = examine(CHECKPOINT)
    assert facts["stored"] == {"F16": facts["parameters"]}
    assert facts["bytes"] == (CHECKPOINT / "model.safetensors").stat().st_size
    assert (facts["exported"], facts["quantised"], facts["proven"]) == (False, None, True)
    assert (notes, problems) == (["checkpoint.proven"], [])


def test_a_large_checkpoint_is_not_proven_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "QUICK", 0)
    facts, notes, _ = examine(CHECKPOINT)
    assert notes == ["checkpoint.certify"]
    assert "proven" not in facts


OWN = "OWNER/NAME--modeling_qwen2_fp16"
WRONG_CODE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "exported": (
        {
            "architectures": ["Qwen2FP16ForCausalLM"],
            "auto_map": {"AutoModel": f"{OWN}.Qwen2FP16Model", "AutoModelForCausalLM": f"{OWN}.Qwen2FP16ForCausalLM"},
        },
        ["checkpoint.exported"],
    ),
    "code under a stock name": (
        {"auto_map": {"AutoModel": "modeling_x.Model", "AutoModelForCausalLM": "modeling_x.LM"}},
        ["checkpoint.stock_name"],
    ),
    "no AutoModel": (
        {"architectures": ["Qwen2XForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_x.LM"}},
        ["checkpoint.no_auto_model"],
    ),
}


@pytest.mark.parametrize("sort", WRONG_CODE)
def test_code_that_leads_to_a_model_without_the_fix_is_named(sort: str, tmp_path: Path) -> None:
    """vLLM silently runs its own Qwen2 for a stock name, and the stock one for an auto_map without AutoModel."""
    config, expected = WRONG_CODE[sort]
    facts, notes, problems = examine(copy_of_demo(tmp_path / "x", **config))
    own = sort == "exported"  # what is not loads as something else than what is proven here
    assert notes == [*expected, "checkpoint.proven" if own else "checkpoint.not_proven"]
    assert problems == ([] if own else ["checkpoint.foreign_code"])
    assert facts["exported"] is own
    assert "OWNER" not in json.dumps(checkpoint.CheckpointFacts(**facts, notes=[]).to_dict())


def test_a_strict_export_is_known(tmp_path: Path) -> None:
    """By its type alone, should its auto_map have got lost."""
    facts, notes, problems = examine(copy_of_demo(tmp_path / "x", model_type="qwen2_fp16"))
    assert facts["exported"]
    assert (notes, problems) == (["checkpoint.exported", "checkpoint.proven"], [])


def test_an_export_leads_to_no_model_without_the_fix(tmp_path: Path) -> None:
    for strict in (False, True):
        out = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / str(strict), strict=strict)
        assert examine(out)[1:] == (["checkpoint.exported", "checkpoint.proven"], [])


@pytest.mark.parametrize(
    ("method", "code"),
    [("gptq", "gptq"), ("awq", "awq"), ("bitsandbytes", "bitsandbytes"), ("quark", "other"), (None, "other")],
)
def test_quantisation_is_explained(method: str | None, code: str, tmp_path: Path) -> None:
    path = copy_of_demo(tmp_path / "x", quantization_config={"bits": 4, **({"quant_method": method} if method else {})})
    replace_tensors(
        path, lambda tensors: {name.replace("_proj.weight", "_proj.qweight"): x for name, x in tensors.items()}
    )
    facts, notes, problems = examine(path)
    assert facts["quantised"] == (method or "unnamed")
    assert notes == [f"quantised.{code}", "checkpoint.never_proven"]
    assert not problems


def test_what_cannot_be_used_is_a_finding(healthy: None, tmp_path: Path) -> None:
    other = copy_of_demo(tmp_path / "other", model_type="llama")
    assert examine(other)[1:] == ([], ["checkpoint.not_qwen2"])
    found = qwen2_fp16_fix.doctor(other)
    assert (found.exit_code, found.advice) == (2, [])  # it said to call register()
    damaged = copy_of_demo(tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert examine(damaged)[2] == ["checkpoint.broken"]
    found = qwen2_fp16_fix.doctor(damaged)
    assert codes(found.findings) == ["checkpoint.broken"]
    assert found.exit_code == 2  # as certify, scan and verify
    weights.unlink()
    (damaged / "training_args.bin").write_bytes(b"")
    assert examine(damaged)[2] == ["checkpoint.broken"]
    (damaged / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    assert examine(damaged)[1:] == (["checkpoint.bin"], [])


def test_a_large_checkpoint_is_seen_to_be_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reads its weights, so nothing else would notice what is missing."""
    monkeypatch.setattr(checkpoint, "QUICK", 0)
    path = copy_of_demo(tmp_path / "x")
    missing = "model.layers.2.mlp.up_proj.weight"
    replace_tensors(path, lambda tensors: {name: x for name, x in tensors.items() if name != missing})
    assert examine(path)[2] == ["checkpoint.broken"]


def test_a_head_of_another_sort_is_not_missed(tmp_path: Path) -> None:
    """A classifier has no lm_head, and is whole without."""
    path = copy_of_demo(tmp_path / "x", architectures=["Qwen2ForSequenceClassification"])
    replace_tensors(path, lambda tensors: {name: x for name, x in tensors.items() if name != "lm_head.weight"})
    assert examine(path)[1:] == (["checkpoint.proven"], [])


def test_a_qwen2_inside_another_model_is_not_called_foreign(tmp_path: Path) -> None:
    path = copy_of_demo(tmp_path / "x", model_type="llava", text_config={"model_type": "qwen2"})
    assert examine(path)[1:] == (["checkpoint.wrapped"], [])


def test_what_cannot_be_proven_is_a_warning(healthy: None, tmp_path: Path) -> None:
    """Weights past 65504: the cast to float16 makes them infinite, whatever the arithmetic."""

    def too_large(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
        return tensors

    path = copy_of_demo(tmp_path / "x")
    replace_tensors(path, too_large)
    found = qwen2_fp16_fix.doctor(path)
    assert codes(found.warnings) == ["checkpoint.not_proven"]
    assert codes(found.findings) == ["checkpoint.infinite_weights"]  # float16 with the fix was the advice
    assert found.checkpoint.stored == {"F32": found.checkpoint.parameters}


@pytest.mark.parametrize(
    "content",
    [
        None,
        "[]",
        "{",
        '{"architectures": 5}',
        '{"hidden_size": NaN}',
        '{"rope_theta": -Infinity}',
        '{"hidden_size": 1e999}',
        "{}",
    ],
)
def test_a_path_without_a_checkpoint_is_wrong_usage(
    content: str | None, healthy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "x"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    if content == "{}":  # JSON, and so a config: of nothing known
        assert codes(qwen2_fp16_fix.doctor(folder).findings) == ["checkpoint.not_qwen2"]
        return
    monkeypatch.setattr(self_test, "self_test", lambda place: pytest.fail("tested first, which takes a while"))
    with pytest.raises(qwen2_fp16_fix.CheckpointError) as caught:
        qwen2_fp16_fix.doctor(folder)
    assert content is None or str(tmp_path) not in str(caught.value)  # where nothing is, what was given is named
