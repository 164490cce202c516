"""Random models near the edge of what can be proven, and gradients that look for a number past float16."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.fuzz import proofs
from tests.fuzz.worker import Trial

COUNT = 500
RESTARTS, STEPS = 4, 12  # of the adversary
LARGEST = 65504.0
ROTATIONS: tuple[dict[str, Any] | None, ...] = (
    None,
    None,
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 3.0, "mscale_all_dim": 0.5, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 2.0, "attention_factor": 30.0, "original_max_position_embeddings": 64},
    {"rope_type": "linear", "factor": 8.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
)


def sizes(chosen: random.Random) -> dict[str, Any]:
    """A configuration of up to three layers, up to 64 wide."""
    kv, groups, head_dim = chosen.choice((1, 2, 3)), chosen.choice((1, 2, 4)), chosen.choice((2, 4, 8, 16))
    found: dict[str, Any] = {
        "vocab_size": chosen.choice((7, 64, 200)),
        "hidden_size": kv * groups * head_dim,
        "intermediate_size": chosen.choice((1, 8, 24, 100)),
        "num_hidden_layers": chosen.choice((1, 2, 3)),
        "num_attention_heads": kv * groups,
        "num_key_value_heads": kv,
        "max_position_embeddings": chosen.choice((4, 64, 128, 4096)),
        "hidden_act": chosen.choice(("silu", "silu", "silu", "gelu", "relu", "gelu_pytorch_tanh", "gelu_new")),
        "rms_norm_eps": chosen.choice((1e-6, 1e-6, 1e-5, 1e-12, 1e-3)),
        "tie_word_embeddings": chosen.random() < 0.3,
        "rope_theta": chosen.choice((1e4, 1e6, 10.0)),
        "attention_dropout": chosen.choice((0.0, 0.0, 0.0, 0.1)),
    }
    rotation = chosen.choice(ROTATIONS)
    if rotation and head_dim < 4:  # transformers itself divides by 0 for some
        rotation = None
    return found | ({"rope_scaling": rotation} if rotation else {})


@torch.no_grad()
def fill(model: Any, chosen: random.Random, generator: torch.Generator) -> None:
    """Random weights: the same scale for all, some grown by up to 17 bits, and some rows or channels on their own."""
    scale, gain = 2.0 ** chosen.choice((0, 0, 0, -2, -8, -20, 3)), chosen.choice((0.1, 0.5, 3.0))
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        parameter.normal_(generator=generator)
        if "norm" in name:
            parameter.mul_(gain).add_(1)
        elif parameter.ndim == 2 and "embed" not in name:
            parameter.mul_(scale * parameter.shape[1] ** -0.5)
    for name in chosen.sample(sorted(named), chosen.choice((0, 1, 1, 2, 4))):
        named[name].mul_(2.0 ** chosen.randrange(-10, 18))
    for name in chosen.sample(sorted(named), chosen.choice((0, 0, 1, 2, 3))):
        spike(named[name], chosen)
    for parameter in named.values():
        parameter.clamp_(-LARGEST, LARGEST)


def spike(parameter: Tensor, chosen: random.Random) -> None:
    """One number, row or column of a weight that is far larger than the rest, or the same everywhere."""
    value = chosen.choice((300.0, 3e3, 6e4, LARGEST, 2.0**-24, 0.0))
    row, column = chosen.randrange(len(parameter)), chosen.randrange(parameter.shape[-1])
    chosen.choice((parameter.view(-1)[row : row + 1], parameter[row], parameter[..., column])).fill_(value)


def build(folder: Path, chosen: random.Random, seed: int) -> None:
    """Writes the model to the folder, in a dtype of checkpoints."""
    settings = sizes(chosen)
    model = Qwen2ForCausalLM(Qwen2Config(**json.loads(json.dumps(settings)))).float()
    fill(model, chosen, torch.Generator().manual_seed(seed))
    dtype = chosen.choice((torch.float16, torch.float16, torch.bfloat16, torch.float32))
    tied = settings["tie_word_embeddings"]
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if not (tied and "lm_head" in name)}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **settings}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def prepare(numbers: Sequence[int]) -> None:
    """Nothing: each model is made anew."""


def attempt(trial: Trial) -> None:
    """Certifies a random model and tries to disprove what it says."""
    folder = trial.folder / "model"
    folder.mkdir()
    build(folder, trial.random, trial.number)
    proofs.check(trial, folder, RESTARTS, STEPS)
