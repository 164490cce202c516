"""Runs prompts through a Qwen2 layer by layer: every prompt through one layer, then through the next.

So a layer's weights are needed once, and only while it runs. Before the run the model is asked which arguments it
passes to each layer, such as masks and rotary embeddings.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Qwen2Config

from ..checkpoints.loading import first_run, quiet
from ..patches.architecture import QWEN2
from ..patches.attention_form import ALL_ATTENTION_FUNCTIONS
from ..patches.modeling_qwen2_fp16 import STOCK
from ..patches.stock_wanted import stock_models
from .weights_on_demand import WeightProvider

WIDENED = 2**22  # numbers of a weight that are in fp32 at a time
LOGITS = 2**24  # logits computed at a time


class Call(NamedTuple):
    """The arguments that a model passes to one of its layers, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class FullPrecision(TorchFunctionMode):
    """While entered, a float16 model computes in fp32: its embeddings are widened, and each weight as it is used.

    Everything else becomes fp32 by type promotion. No second copy of the model is needed.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function, linears and embeddings in fp32."""
        kwargs = kwargs or {}
        if function is nn.functional.linear:
            return wide_linear(*args, **kwargs)
        result = function(*args, **kwargs)
        return result.float() if function is nn.functional.embedding else result


def wide_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input (..., in) times weight (out, in) in fp32, some rows of the weight at a time: (..., out)."""
    rows = max(1, WIDENED // weight.shape[1])
    if len(weight) <= rows:
        return nn.functional.linear(input.float(), weight.float(), None if bias is None else bias.float())
    output = torch.empty(*input.shape[:-1], len(weight), dtype=torch.float32, device=input.device)
    wide = input.float()
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        shift = None if bias is None else bias[part].float()
        output[..., part] = nn.functional.linear(wide, weight[part].float(), shift)
    return output


class LayerwiseRun:
    """The hidden states of every prompt on their way through a model, in its own arithmetic or in fp32."""

    def __init__(self, provider: WeightProvider, prompts: Sequence[Tensor], full_precision: bool = False) -> None:
        """prompts: token ids (1, S) each. The embedding's weights must be there."""
        self.provider, self.full_precision = provider, full_precision
        self.hidden: list[Tensor] = []
        self.calls: list[list[Call]] = []
        with self.running():
            for tokens in prompts:
                calls = record_calls(provider.base, tokens.to(provider.device))
                self.hidden.append(calls[0][0])
                self.calls.append([call for _, call in calls])

    @contextmanager
    def running(self) -> Iterator[None]:
        """For a block that runs the model: without gradients, and in fp32 with an attention that stores no scores."""
        with torch.no_grad():
            if self.full_precision:
                with FullPrecision(), fused_attention(self.provider.base):
                    yield
            else:
                yield

    def step(self, number: int, around: Callable[[int], AbstractContextManager[object]]) -> None:
        """Takes every prompt through a layer, inside `around(prompt's index)`."""
        layer = self.provider.base.layers[number]
        for index, call in enumerate(calls[number] for calls in self.calls):
            with self.running(), around(index), nullcontext() if number else first_run():
                output = layer(self.hidden[index], *call.args, **call.kwargs)
            self.hidden[index] = output[0] if isinstance(output, tuple) else output

    def normed(self, index: int) -> Tensor:
        """A prompt's hidden states after the final norm: (1, S, hidden)."""
        with self.running():
            normed: Tensor = self.provider.base.get_submodule(QWEN2.final_norm())(self.hidden[index])
        return normed

    def logits(self, normed: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The head's outputs for some tokens at a time, with the position of the first."""
        head = self.provider.head
        if head is None:
            return
        width = getattr(head, "out_features", self.provider.base.config.vocab_size)
        size = max(1, LOGITS // width)
        for start in range(0, normed.shape[1], size):
            with self.running():
                part = head(normed[:, start : start + size])
            yield start, part


def record_calls(base: Any, tokens: Tensor) -> list[tuple[Tensor, Call]]:
    """The arguments that the model passes to each layer, with its hidden states.

    The layers are replaced by ones that return their input. So only masks, positions and rotation mean anything.
    """
    real = base.layers
    base.layers = nn.ModuleList(_RecordingLayer(layer) for layer in real)
    try:
        with first_run():
            base(input_ids=tokens, use_cache=False)
        return [stand_in.__dict__["called"] for stand_in in base.layers]
    finally:
        base.layers = real


class _RecordingLayer(nn.Module):
    """Stands in for a layer: keeps the arguments that it is called with, and returns the hidden states as they are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name in ("attention_type", "layer_type", "sliding_window"):  # some releases choose the mask by these
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["called"] = (hidden_states, Call(args, kwargs))
        return (hidden_states,) if layers_return_tuples() else hidden_states


@functools.cache
def layers_return_tuples() -> bool:
    """Whether a decoder layer of this release returns a tuple, seen on the smallest one."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 8}
    found: list[bool] = []
    with torch.random.fork_rng(devices=[]), quiet(), stock_models():
        model = STOCK.Qwen2Model(Qwen2Config(**sizes, **heads)).eval()
    model.layers[0].register_forward_hook(lambda module, args, output: found.append(isinstance(output, tuple)))
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    return found[0]


@contextmanager
def fused_attention(base: Any) -> Iterator[None]:
    """Lets attention run through torch's fused kernel. Only releases from 4.48 on choose it by config at every call."""
    if not ALL_ATTENTION_FUNCTIONS:  # before 4.48 the class of an attention decides
        yield
        return
    configs = {id(module.config): module.config for module in base.modules() if hasattr(module, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
