"""Models with spiked keys, plain, quantised and in an adapter, and their distance from fp32, for several files here."""

import functools
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import qwen2_fp16_fix
from benchmarks.workloads import CACHE
from tests.helpers import Quantised, kl_to
from tests.stress import ROPE_THETA, TINY, build, random_prompt

PROMPT = random_prompt(TINY, batch=2, length=48)
EXACT, ROUNDED, UNCENTRED = {"centred"}, {"centred, bias rounded before"}, {"not centred"}

#: KL to fp32 of these weights, nats. Exact biases are at 3e-7, rounded ones at 1e-3 as stock.
CLOSE = 5e-6


@torch.no_grad()
def logits(model: Any, tokens: Tensor = PROMPT, **inputs: Any) -> Tensor:
    """In fp32. With a cache only where one is given."""
    found: Tensor = model(input_ids=tokens, use_cache=CACHE in inputs, **inputs).logits
    return found.float()


def half() -> Any:
    """The stock model in float16."""
    return build(TINY, ("keys",)).half()


def fixed(*kinds: str, attention: str = "eager", dtype: torch.dtype = torch.float16, **settings: Any) -> Any:
    """A fixed model of these kinds."""
    return qwen2_fp16_fix.fix(build(TINY, kinds, attn_implementation=attention, **settings).to(dtype))


def attentions(model: Any) -> list[Any]:
    """Its attention modules, by layer."""
    return [module for module in model.modules() if hasattr(module, "k_proj")]


def states(model: Any) -> set[str]:
    """What `status` says of its keys."""
    return {row.keys for row in qwen2_fp16_fix.status(model).model.ranges}


@functools.cache
def oracle() -> Tensor:
    """The fp32 logits."""
    return logits(build(TINY, ("keys",)))


def error(model: Any) -> float:
    """The KL from fp32, in nats. Its logits must be finite."""
    found = logits(model)
    assert torch.isfinite(found).all()
    return kl_to(oracle(), found)


@functools.cache
def stock_error() -> float:
    """The KL of stock float16 from fp32, in nats."""
    return error(half())


def replace(model: Any, make: Callable[[nn.Module], nn.Module]) -> Any:
    """The model with other query and key projections."""
    for attention in attentions(model):
        attention.q_proj, attention.k_proj = make(attention.q_proj), make(attention.k_proj)
    return model


def tables(*positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin (1, S, D) in fp64 from RoPE's definition."""
    frequency = ROPE_THETA ** (-torch.arange(0, TINY.head_dim, 2, dtype=torch.float64) / TINY.head_dim)
    angles = torch.outer(torch.tensor(positions, dtype=torch.float64), frequency)
    return torch.cat((angles, angles), -1).cos()[None], torch.cat((angles, angles), -1).sin()[None]


# --- quantised ---


def quantised(first: str = "quantised", kind: type[Quantised] = Quantised) -> Any:
    """A model with quantised projections, fixed before or afterwards."""
    model = half() if first == "quantised" else qwen2_fp16_fix.fix(half())
    replace(model, kind.of)
    return qwen2_fp16_fix.fix(model) if first == "quantised" else model


# --- adapters ---


SIZES: dict[str, dict[str, Any]] = {
    "Lora": {"r": 2},
    "LoHa": {"r": 2},
    "LoKr": {"r": 2},
    "AdaLora": {"total_step": 10, "init_r": 2, "target_r": 1},
    "BOFT": {"boft_block_size": 4, "boft_n_butterfly_factor": 1},
    "C3A": {"block_size": 8},
    "FourierFT": {"n_frequency": 20},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": []},
    "Miss": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "Road": {"group_size": 16},
    "Shira": {"r": 2},
    "VBLoRA": {"num_vectors": 8, "vector_length": 8},
    "Vera": {"r": 8},
    "WaveFT": {"n_frequency": 20},
}


def wrap(model: Any, kind: str) -> Any:
    """The model in a new adapter of that kind."""
    import peft

    chosen = getattr(peft, f"{kind}Config")(target_modules=["q_proj", "k_proj"], **SIZES.get(kind, {}))
    return peft.get_peft_model(model, chosen).eval()


@functools.cache
def learned(kind: str) -> dict[str, Tensor]:
    """An adapter that does something, made once: float16 and fp32 draw other random numbers."""
    torch.manual_seed(0)
    model = wrap(build(TINY, ("keys",)), kind)
    base = {name for name, _ in model.named_parameters() if "base_layer" in name}
    found = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return {name: value + torch.randn(value.shape) * 0.02 for name, value in found.items() if name not in base}


def adapted(model: Any = None, kind: str = "Lora") -> Any:
    """A model, by default a fixed one, in that adapter."""
    torch.manual_seed(0)
    model = wrap(qwen2_fp16_fix.fix(half()) if model is None else model, kind)
    with torch.no_grad():
        for name, value in learned(kind).items():
            model.get_parameter(name).copy_(value)
    return model


def by_pickle(cache: Any) -> Any:
    """A cache that was written and read back."""
    return pickle.loads(pickle.dumps(cache))


def by_growing_the_batch(cache: Any) -> Any:
    """A cache whose rows were repeated, and every second one taken."""
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))
    return cache


def rotation_of(rope: str | None) -> dict[str, Any]:
    """Settings of a tiny model whose rotary embedding is of that variant, and that is longer than it was trained."""
    pairs = TINY.head_dim // 2
    settings = {
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "short_factor": [1.0] * pairs,
        "long_factor": [2.0] * pairs,
    }
    wanted = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor", "original_max_position_embeddings"),
        "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
        "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    }
    chosen = {name: settings[name] for name in wanted.get(rope or "", ())}
    rotation = {"rope_parameters": {"rope_type": rope or "default", "rope_theta": 1e6, **chosen}}
    return rotation | {"max_position_embeddings": 32}
