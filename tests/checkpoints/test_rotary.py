"""The rotary settings of a config: no release scales cos and sin by more, and frequencies are finite or named."""

import random
from typing import Any

import pytest
import torch
import transformers
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from qwen2_fp16_fix.checkpoints.rotary import check_rotary, rotation_scale, unusual_settings
from qwen2_fp16_fix.errors import CheckpointError

YARN = {"rope_type": "yarn", "factor": 4.0}
NEGATIVE = {"mscale": -8.0, "mscale_all_dim": -12.0}
LONG = {"rope_type": "longrope", "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 1.0),
        ({"rope_scaling": YARN}, 1.1386),
        ({"rope_scaling": YARN | {"attention_factor": 1.5}}, 1.5),
        # releases take 4 from the factor, or 32768 / 4096 = 8
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 4096}}, 1.2079),
        ({"rope_scaling": LONG, "max_position_embeddings": 4096}, 1.0801),
        ({"rope_scaling": LONG, "max_position_embeddings": 8192, "original_max_position_embeddings": 4096}, 1.0801),
        # what is negative turns a pair around, and is as long
        ({"rope_scaling": YARN | {"attention_factor": -3.0}}, 3.0),
        ({"rope_scaling": YARN | {"mscale": -40.0, "mscale_all_dim": 1.0}}, 3.9918),
        ({"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": -40.0}}, 1.1386),
        # of two factors, 2 as written and 8 of the lengths, the smaller one has the larger scale
        ({"rope_scaling": YARN | {"factor": 2.0, "original_max_position_embeddings": 4096} | NEGATIVE}, 2.6482),
        # one release reads the first, another the second, and a third either
        ({"rope_scaling": YARN | {"attention_factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, 2.0),
        ({"rope_parameters": YARN | {"attention_factor": 2.0}, "rope_scaling": {"rope_type": "default"}}, 2.0),
        ({"rope_scaling": YARN | {"attention_factor": 2.0, "type": "default"}}, 2.0),
        ({"rope_scaling": YARN | {"attention_factor": 2.0, "rope_type": "default", "type": "yarn"}}, 2.0),
        ({"rope_parameters": {"full_attention": YARN | {"attention_factor": 2.0}}}, 2.0),
    ],
)
def test_the_largest_scale_of_all_releases_counts(config: dict[str, Any], scale: float) -> None:
    """`certify` took the scale of one group, with its sign, and of the largest factor: such models were not finite."""
    assert rotation_scale(config) == pytest.approx(scale, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rope_theta": 0}, "its rope_theta is 0"),
        ({"rope_theta": 1e-30}, "its rope_theta is 1e-30"),
        ({"rope_theta": 1e300}, "its rope_theta is 1e+300"),
        ({"rope_parameters": {"rope_theta": 0.5}}, "its rope_theta is 0.5"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 0}}}, "its rope_theta is 0"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "its factor is 0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1e17}}, "its factor is 1e+17"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0, 0.0]}}, "its short_factor is 0.0"),
        ({"rope_scaling": {"type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}}, "low_freq_factor is 4"),
        ({"rope_scaling": {"type": "YaRN"}}, "of type 'YaRN'"),
        ({"partial_rotary_factor": 0.25}, "its partial_rotary_factor is 0.25"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "its partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"rope_type": "default", "type": ["yarn"]}}, "of type ['yarn']"),
    ],
)
def test_settings_whose_frequencies_may_not_be_finite_are_named(settings: dict[str, Any], said: str) -> None:
    assert any(said in sentence for sentence in unusual_settings(settings)), list(unusual_settings(settings))


@pytest.mark.parametrize("name", ["factor", "attention_factor", "mscale", "long_factor", "beta_fast"])
@pytest.mark.parametrize("value", ["4.0", True, {}, float("inf")])
def test_what_is_no_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"config.json has {name} = "):
        check_rotary({"rope_parameters": YARN | {name: value}})
    with pytest.raises(CheckpointError, match="not a group of settings"):
        check_rotary({"rope_scaling": [YARN]})


@pytest.mark.parametrize("held", [[], [1.0] * 15, [1.0] * 17])
def test_longrope_has_a_factor_for_each_pair(held: list[float]) -> None:
    """transformers builds the model and fails in its first forward."""
    for name in ("short_factor", "long_factor"):
        with pytest.raises(CheckpointError, match=f"has {len(held)} numbers in {name} for 16 pairs"):
            check_rotary({"rope_scaling": {"type": "longrope", name: held}}, pairs=16)
        check_rotary({"rope_scaling": {"type": "yarn", name: held}}, pairs=16)


@pytest.mark.parametrize("value", ["x" * 5000, ["x"] * 3000, {"x" * 5000: {}}])
def test_what_a_config_says_is_quoted_in_short(value: Any) -> None:
    with pytest.raises(CheckpointError) as error:
        check_rotary({"rope_parameters": {"factor": value}})
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("share", [0, -0.5, 1.5, 1e6])
def test_a_share_of_channels_is_one(share: float) -> None:
    with pytest.raises(CheckpointError, match="not a share of the channels"):
        check_rotary({"rope_parameters": {"partial_rotary_factor": share}})


def random_config(chooser: random.Random) -> dict[str, Any]:
    """A config of a tiny model with rotary settings of all kinds, most of them extreme."""
    kinds, numbers = (
        ("default", "linear", "dynamic", "yarn", "yarn", "longrope", "llama3"),
        (-40, -1, 0, 0.5, 1, 4, 1e9),
    )
    found: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "max_position_embeddings": chooser.choice((64, 4096, 131072)),
    }
    for place in chooser.choice((("rope_scaling",), ("rope_parameters",), ("rope_scaling", "rope_parameters"))):
        group: dict[str, Any] = {chooser.choice(("type", "rope_type")): chooser.choice(kinds), "rope_theta": 1e6}
        group["factor"] = chooser.choice((1.0, 2.0, 4.0, 32.0))
        for name in ("attention_factor", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor", "factor"):
            if chooser.random() < 0.3:
                group[name] = chooser.choice(numbers)
        for name in ("short_factor", "long_factor"):
            group[name] = [chooser.choice((1.0, 2.0, 40.0)) for _ in range(16)]
        if chooser.random() < 0.5:
            group["original_max_position_embeddings"] = chooser.choice((2, 32, 4096))
        found[place] = group
    if chooser.random() < 0.3:
        found["rope_theta"] = chooser.choice((0, 0.5, 1e-40, 1e4, 1e30))
    if chooser.random() < 0.2:
        found["original_max_position_embeddings"] = chooser.choice((2, 1024))
    return found


def test_the_installed_release_stays_inside_at_random() -> None:
    """Its own rotary embedding, of 400 configs: finite angles or a sentence, and never a larger scale."""
    chooser, built, named = random.Random(0), 0, 0
    for _ in range(400):
        config = random_config(chooser)
        bound, sentences = rotation_scale(config), list(unusual_settings(config))
        try:
            rotary = Qwen2RotaryEmbedding(transformers.Qwen2Config(**config))
        except Exception:  # transformers builds no such model
            continue
        built, named = built + 1, named + bool(sentences)
        farthest = rotary.inv_freq * config["max_position_embeddings"]
        assert sentences or torch.isfinite(farthest).all(), config
        assert abs(float(rotary.attention_scaling)) <= bound * (1 + 1e-12), config
    assert built - named > 100  # so that most of the configs say something
