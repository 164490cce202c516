"""What a certificate takes from a config beside the sizes, what it names as not covered, and how it says so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen2_fp16_fix
from qwen2_fp16_fix.certification.assumptions import assumptions_of, residual_obstacles
from qwen2_fp16_fix.certification.result import Certificate
from tests.stress import TINY, build


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "checkpoint"
    build(TINY, ()).half().save_pretrained(folder)
    return folder


@pytest.fixture
def with_settings(plain: Path, tmp_path: Path) -> Any:
    """A function from settings to the certificate of a checkpoint with them, and with no other rotary settings."""

    def certified(**settings: Any) -> Certificate:
        config = json.loads((plain / "config.json").read_text())
        config = {key: value for key, value in config.items() if not key.startswith("rope")} | settings
        (tmp_path / "config.json").write_text(json.dumps(config))
        if not (tmp_path / "model.safetensors").exists():
            (tmp_path / "model.safetensors").hardlink_to(plain / "model.safetensors")
        return qwen2_fp16_fix.certify(tmp_path)

    return certified


YARN = {"rope_type": "yarn", "factor": 4.0}
NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "eps that fp32 holds as 0": ({"rms_norm_eps": 1e-60}, "rms_norm_eps is 1e-60"),
    "eps of 0": ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    "eps that is subnormal": ({"rms_norm_eps": 1e-39}, "rms_norm_eps is 1e-39"),
    "eps that fp32 does not hold": ({"rms_norm_eps": 1e39}, "rms_norm_eps is 1e+39"),
    "a theta of 0": ({"rope_theta": 0}, "rope_theta is 0"),
    "a theta of 0 in the other place": ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
    "a factor of 0": ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
    "an unknown kind": ({"rope_scaling": {"type": "Yarn", "factor": 4.0}}, "type 'Yarn'"),
    "a huge scale": ({"rope_scaling": YARN | {"attention_factor": -1e30}}, "rotated is bounded by "),
    "a huge scale that another release reads": (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN | {"attention_factor": 1e30}},
        "rotated is bounded by ",
    ),
    "no window": ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
    "an unknown activation": ({"hidden_act": "relu2"}, "product has no finite bound"),
}


@pytest.mark.parametrize("case", NAMED)
def test_a_setting_that_no_bound_covers_is_in_the_verdict(case: str, with_settings: Any) -> None:
    """Each was called proven once, or is of the same kind, and a model with it may not be finite."""
    settings, said = NAMED[case]
    found = with_settings(**settings)
    assert not found.proven
    assert said in found.verdict, found.verdict
    assert not found.to_dict()["proven"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rms_norm_eps": None},
        {"rms_norm_eps": 1e-12},
        {"rope_theta": 1e4},
        {"rope_scaling": YARN | {"attention_factor": -1.5}},
        {"rope_parameters": YARN | {"rope_theta": 1e6, "mscale": -1.0, "mscale_all_dim": 0.5}},
        {"use_sliding_window": False, "sliding_window": 0},
        {"hidden_act": "gelu_new"},
    ],
)
def test_settings_that_the_bounds_cover_are_proven(settings: dict[str, Any], with_settings: Any) -> None:
    found = with_settings(**settings)
    assert found.proven, found.verdict


def test_a_scale_that_is_negative_asks_for_the_exponents_of_its_magnitude(with_settings: Any) -> None:
    """Lengths of keys came out negative, and so below every limit."""
    found = [with_settings(rope_scaling=YARN | {"attention_factor": factor}) for factor in (3e4, -3e4)]
    assert found[0].layers == found[1].layers
    assert found[0].layers[0].exponents["rotated"] > 0


def test_a_fixed_model_is_planned_for_the_magnitude_too(with_settings: Any) -> None:
    """A layer whose attention scales by -3e4 had exponents of 0, and its keys were infinite."""
    model = qwen2_fp16_fix.fix(build(TINY, ()).half())
    model.model.rotary_emb.attention_scaling = -3e4
    qwen2_fp16_fix.fix(model)
    assert model.model.layers[0].plan.exponents.rotated > 0
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_what_is_assumed_is_in_the_verdict_the_data_and_the_table(with_settings: Any) -> None:
    """The length of a prompt, layers that scale by token, and dropout, which multiplies by 100 in training."""
    found = with_settings(attention_dropout=0.99, max_position_embeddings=12345)
    assert found.proven
    for said in (
        "up to 12,345 tokens",
        "offloaded, sharded, quantised, adapted or trained",
        "attention_dropout of 0.99",
    ):
        assert said in found.verdict
    assert "100 times as large" in " ".join(found.to_dict()["assumes"])
    assert "dropout" not in with_settings(attention_dropout=0.0).verdict


@pytest.mark.parametrize("share", [0, 0.0, None, "x", 1, 2.0])
def test_a_share_that_makes_nothing_larger_is_not_mentioned(share: Any) -> None:
    assert len(assumptions_of({"attention_dropout": share}, 8).sentences()) == 2


def test_a_gain_is_bounded_as_it_is_stored() -> None:
    """Under autocast a gain in fp32 is not rounded to float16, where 1 + 2^-12 is 1: the bound came out below it."""
    model = build(TINY, ())
    with torch.no_grad():
        for norm in (model.model.layers[1].input_layernorm, model.model.norm):
            norm.weight.fill_(1.0 + 2.0**-12)
    found = qwen2_fp16_fix.certify(model)
    rounded = qwen2_fp16_fix.certify(model.half())
    assert found.layers[1].bounds["input_norm"] > rounded.layers[1].bounds["input_norm"]
    assert found.logits > rounded.logits


def test_a_row_of_zeros_in_the_embedding_is_covered(plain: Path, tmp_path: Path) -> None:
    """Its mean square is 0, so a norm divides by the root of eps alone."""
    tensors = load_file(plain / "model.safetensors")
    tensors["model.embed_tokens.weight"][5] = 0
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((plain / "config.json").read_text())
    assert qwen2_fp16_fix.certify(tmp_path).proven
    model = qwen2_fp16_fix.Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    with torch.no_grad():
        assert model(torch.full((1, 3), 5)).logits.isfinite().all()


def test_a_residual_whose_squares_pass_fp32_is_named() -> None:
    """A norm would divide by infinity: 2^64 squared is the first number that fp32 does not hold."""
    assert list(residual_obstacles(2.0**63, 1)) == []
    assert list(residual_obstacles(float("inf"), 1)) == []  # some layer has said so
    assert "squares overflow" in next(residual_obstacles(2.0**62, 16))
