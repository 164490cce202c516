"""A loaded model and its checkpoint are read alike: the same names, the same values, refusals of the same kind."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2_fp16_fix.checkpoints.config import (
    builds_own_model,
    code_named,
    dtype_keyword,
    foreign_code,
    generates,
    is_exported,
)
from qwen2_fp16_fix.checkpoints.folder import FolderSource, open_checkpoint
from qwen2_fp16_fix.checkpoints.loaded_model import ModelSource
from qwen2_fp16_fix.checkpoints.weights import UnboundedWeightError, WeightSource
from qwen2_fp16_fix.errors import CheckpointError
from tests.stress import TINY, build

OWN = "OWNER/NAME--modeling_qwen2_fp16"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[WeightSource, WeightSource]:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = build(TINY, ("swiglu",))
    model.save_pretrained(folder)
    return ModelSource(model), FolderSource(folder)


def test_both_sources_read_the_same(sources: tuple[WeightSource, WeightSource]) -> None:
    loaded, stored = sources
    assert (loaded.layers, loaded.intermediate, loaded.shape) == (stored.layers, stored.intermediate, stored.shape)
    assert loaded.warnings == stored.warnings == ()
    for number in range(loaded.layers):
        assert loaded.layer_names(number) == stored.layer_names(number)
        for name in loaded.layer_names(number):
            own, other = (source.read(f"{source.prefix}layers.{number}.{name}") for source in sources)
            assert torch.equal(own, other), name
    embeddings = [torch.cat(list(source.rows(f"{source.prefix}embed_tokens.weight"))) for source in sources]
    assert torch.equal(*embeddings)


def test_a_bias_that_qwen2_has_not_is_not_bounded() -> None:
    model: Any = build(TINY, ())
    model.model.layers[1].self_attn.o_proj.bias = torch.nn.Parameter(torch.zeros(TINY.hidden))
    source = ModelSource(model)
    assert source.layer_names(0)
    with pytest.raises(UnboundedWeightError, match="o_proj has a bias"):
        source.layer_names(1)


def test_a_quantised_folder_has_norms_and_no_linears(tmp_path: Path) -> None:
    model = build(TINY, ())
    model.config.quantization_config = {"quant_method": "gptq"}
    model.save_pretrained(tmp_path)
    source = FolderSource(tmp_path)
    for name in source.layer_names(0):
        if "norm" in name:
            source.read(f"model.layers.0.{name}")
        else:
            with pytest.raises(UnboundedWeightError, match=r"quantised \(gptq\)"):
                source.read(f"model.layers.0.{name}")
    with pytest.raises(CheckpointError, match="is quantised"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "exported", "builds"),
    [
        ({}, False, False),
        ({"model_type": "qwen2"}, False, False),
        ({"model_type": "qwen2_fp16"}, True, False),  # a strict export whose auto_map has got lost
        ({"auto_map": {"AutoModel": f"{OWN}.Qwen2FP16Model"}}, True, True),
        ({"auto_map": {"AutoModel": "modeling_qwen2_fp16.Qwen2FP16Model"}}, True, True),
        ({"auto_map": {"AutoModelForCausalLM": f"{OWN}.Qwen2FP16ForCausalLM"}}, True, False),
        ({"auto_map": {"AutoModel": "modeling_x.Model"}}, False, False),
        ({"auto_map": f"{OWN}.Qwen2FP16Model"}, False, False),
    ],
)
def test_an_export_is_known_by_its_config(config: dict[str, Any], exported: bool, builds: bool) -> None:
    assert (is_exported(config), builds_own_model(config)) == (exported, builds)


def test_code_is_named_without_its_owner() -> None:
    config = {"auto_map": {"AutoTokenizer": "a/b--tokens.T", "AutoModel": "a/b--modeling_x.Model"}}
    assert code_named(config) == {"AutoTokenizer": "tokens.T", "AutoModel": "modeling_x.Model"}
    assert foreign_code(config) == "modeling_x.Model"
    assert foreign_code({"auto_map": "a/b--modeling_x.Model"}) == "modeling_x.Model"
    assert foreign_code({"auto_map": {"AutoModel": f"{OWN}.Qwen2FP16Model"}}) is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [(None, None), ([], None), (["Qwen2Model"], False), (["Qwen2Model", "Qwen2FP16StrictForCausalLM"], True)],
)
def test_whether_a_checkpoint_predicts_tokens(names: list[str] | None, expected: bool | None) -> None:
    for unnamed in (False, True):
        assert generates({"architectures": names}, unnamed) == (unnamed if expected is None else expected)


def test_the_dtype_is_called_as_the_release_calls_it() -> None:
    assert [dtype_keyword(version) for version in ("4.37.0", "4.55.4", "4.56.0", "5.24.0")] == [
        "torch_dtype",
        "torch_dtype",
        "dtype",
        "dtype",
    ]
