"""Models with extreme weights and settings, inputs that climb to their largest numbers, and an eye on every tensor."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen2_fp16_fix.patches.architecture import QWEN2
from qwen2_fp16_fix.patches.range_bounds import CONTRACTIONS
from qwen2_fp16_fix.patches.range_plan import LIMIT
from qwen2_fp16_fix.patches.range_sums import SPLITS, UNIT

LINEARS = tuple(linear.name for linear in QWEN2.linears)


class Float16Numbers(TorchDispatchMode):
    """While entered, holds every float16 tensor that torch computes to its limit."""

    #: The matmuls, whose sums of magnitudes are below LIMIT; rounding can grow what is stored by no more than this.
    SUMS = LIMIT * (1 + UNIT) ** (SPLITS + 1)

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found, name = func(*args, **(kwargs or {})), str(func)
        limit = self.SUMS if name.startswith(("aten.mm", "aten.addmm", "aten.bmm")) else 65504.0
        for tensor in tree_leaves(found):
            is_half = isinstance(tensor, Tensor) and tensor.dtype == torch.float16 and tensor.numel() > 0
            if is_half and "empty" not in name:
                largest = float(tensor.abs().max())
                assert largest <= limit, (name, largest)
                self.seen.append(name)
        return found


def worst_inputs(
    stock: Any, site: Callable[[Any], nn.Module], layer: int = 0, restarts: int = 2, steps: int = 25
) -> Tensor:
    """Embeddings (1, 8, hidden) that gradient ascent has found to make the largest number at a site large.

    stock: in fp64, the function of the weights that float16 rounds. site: of a layer, what to hook.
    """
    with torch.enable_grad():
        return _climb(stock, site, layer, restarts, steps)


class _Reached(Exception):
    """Ends a forward at the site: what comes after it changes nothing there. Its argument is the site's output."""


def _climb(stock: Any, site: Callable[[Any], nn.Module], layer: int, restarts: int, steps: int) -> Tensor:
    def stop(module: nn.Module, inputs: Any, output: Tensor) -> None:
        raise _Reached(output)

    hidden = stock.config.hidden_size
    handle = site(stock.model.layers[layer]).register_forward_hook(stop)
    best, largest = torch.zeros(1, 8, hidden), 0.0
    for restart in range(restarts):
        embeddings = torch.randn(1, 8, hidden, generator=torch.Generator().manual_seed(restart)).double()
        for _ in range(steps):
            embeddings.requires_grad_()
            with pytest.raises(_Reached) as reached:
                stock.model(inputs_embeds=embeddings, use_cache=False)
            value = reached.value.args[0].abs().max()
            (slope,) = torch.autograd.grad(value, embeddings)
            if value.item() > largest:
                best, largest = embeddings.detach(), value.item()
            embeddings = (embeddings + 0.3 * slope / slope.norm().clamp(min=1e-300) * embeddings.norm()).detach()
    handle.remove()
    return best


def random_config(chooser: random.Random) -> transformers.Qwen2Config:
    """Small sizes and any setting that a Qwen2 reads, ordinary ones more often than extreme ones."""
    kv_heads, head_dim = chooser.choice((1, 2)), chooser.choice((2, 4, 8, 16))
    rope: dict[str, Any] = {"rope_type": chooser.choice(("default", "linear", "dynamic", "yarn", "yarn"))}
    rope |= {
        "rope_theta": chooser.choice((1e4, 1e4, 1e6, 1e6, 1e6, 2.0, 0.5, 0.0)),
        "factor": chooser.choice((4.0, 1e-3)),
    }
    if rope["rope_type"] == "yarn":
        rope |= {"attention_factor": chooser.choice((None, 1.5, -1.5, 300.0, -3e4)), "mscale": chooser.choice((0, -99))}
        rope |= {
            "mscale_all_dim": chooser.choice((0, 0.5)),
            "original_max_position_embeddings": chooser.choice((16, 64)),
        }
    return transformers.Qwen2Config(
        vocab_size=16,
        hidden_size=chooser.choice((8, 32, 48)),
        intermediate_size=chooser.choice((8, 40)),
        num_hidden_layers=chooser.choice((1, 2, 3)),
        num_attention_heads=kv_heads * chooser.choice((1, 3)),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act=chooser.choice(("silu", "silu", *sorted(CONTRACTIONS))),
        max_position_embeddings=64,
        rms_norm_eps=chooser.choice((1e-6, 1e-6, 1e-6, 1e-5, 1e-5, 1e-30, 1e-60, 0.0, 1e10)),
        tie_word_embeddings=chooser.random() < 0.3,
        use_sliding_window=chooser.random() < 0.3,
        sliding_window=chooser.choice((1, 4)),
        max_window_layers=chooser.choice((0, 1)),
        pad_token_id=chooser.choice((None, 3)),
        rope_parameters=rope,
    )


def random_model(seed: int) -> Any:
    """A stock model in fp32, of float16 weights; None if transformers builds none of its config.

    Each weight is random at a size of its own, up to float16's largest; some have one channel or row that is larger by
    far, or zeros.
    """
    chooser, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    try:
        config = random_config(chooser)
        attention = chooser.choice(("eager", "sdpa"))
        model = transformers.Qwen2ForCausalLM._from_config(config, attn_implementation=attention).float().eval()
    except (ArithmeticError, ValueError):
        return None
    boldness = chooser.choice((0.5, 1.0, 2.0, 4.0))  # decades by which sizes differ
    with torch.no_grad():
        for parameter in model.parameters():
            size = 10 ** chooser.uniform(-boldness, boldness) / (
                parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1
            )
            parameter.normal_(generator=generator).mul_(size)
            channel = chooser.randrange(parameter.shape[-1])
            if chooser.random() < 0.2:
                parameter[..., channel] *= 10 ** chooser.uniform(0, boldness)
            if chooser.random() < 0.2:
                parameter[chooser.randrange(len(parameter))] *= chooser.choice((0.0, 1e-6, 10**boldness))
            parameter.clamp_(-65504, 65504).copy_(parameter.half())
    return model.requires_grad_(False)


def inputs_for(model: Any, seed: int = 0, climbs: int | None = None) -> Iterator[dict[str, Tensor]]:
    """Prompts of tokens, padded ones too; embeddings of every size; and those that climb to the largest numbers.

    model: stock, in fp32. climbs: of how many linears, chosen by the seed; of all of them by default.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, hidden = model.config.vocab_size, model.config.hidden_size
    yield {"input_ids": torch.arange(rows)[None]}
    padded = torch.ones(2, 12, dtype=torch.int64)
    padded[1, :5] = 0
    yield {"input_ids": torch.randint(rows, (2, 12), generator=generator), "attention_mask": padded}
    yield {"input_ids": torch.randint(rows, (1, model.config.max_position_embeddings), generator=generator)}
    for size in (0.0, 1e-7, 1.0, 1e4):
        found = torch.randn(1, 8, hidden, generator=generator) * size
        found[:, :, seed % hidden] *= 10.0  # one channel takes most of the length
        yield {"inputs_embeds": found.clamp(-65504, 65504)}
    exact = model.double()
    places = [(number, name) for number in range(len(exact.model.layers)) for name in LINEARS]
    for number, name in random.Random(seed).sample(places, climbs or len(places)):
        found = worst_inputs(exact, lambda layer: layer.get_submodule(name), number, 1, 6)  # noqa: B023
        yield {"inputs_embeds": found.clamp(-65504, 65504).float()}
    model.float()
