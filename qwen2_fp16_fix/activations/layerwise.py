"""Runs prompts through a Qwen2 layer by layer: every prompt through one layer, then through the next.

So a layer's weights are needed once, and only while it runs: a checkpoint larger than memory is read from disk as it
goes. What a layer is called with (masks, rotation) is what the model itself hands it, recorded beforehand.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Qwen2Config

from ..checkpoints.verification_inputs import first_line
from ..checkpoints.weight_sources import HEADS, FolderSource
from ..demo import build, quiet
from ..errors import CheckpointError
from ..patches.blocks import ALL_ATTENTION_FUNCTIONS
from ..patches.errors import Qwen2FP16FixError
from ..patches.modeling_qwen2_fp16 import ORIGINAL, STOCK, Qwen2ForCausalLM, stock_models
from ..patches.planning import make_plan
from ..patches.swap import base_models, known_class, layers_of

CHUNK = 2**22  # numbers of a weight widened at a time
LOGITS = 2**24  # computed at a time


class Call(NamedTuple):
    """What a model hands one of its layers, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Subject(Protocol):
    """A model whose weights are there inside these contexts."""

    base: Any
    head: nn.Module | None
    device: torch.device

    def embedding(self) -> AbstractContextManager[None]:
        """The embedding's."""

    def layer(self, number: int) -> AbstractContextManager[None]:
        """A layer's."""

    def end(self) -> AbstractContextManager[None]:
        """The final norm's and the head's."""


class LoadedModel:
    """A model that is loaded, in memory or by accelerate's hooks."""

    def __init__(self, model: nn.Module) -> None:
        """model: holds a Qwen2Model."""
        base: Any = next(base_models(model, STOCK))
        self.base = base
        heads = (getattr(module, name, None) for module in model.modules() for name in HEADS)
        self.head: nn.Module | None = next((head for head in heads if isinstance(head, nn.Module)), None)
        at: torch.device = base.embed_tokens.weight.device
        self.device = torch.device("cpu") if at.type == "meta" else at  # accelerate's hook takes it from anywhere

    def embedding(self) -> AbstractContextManager[None]:
        """Always there."""
        return nullcontext()

    def layer(self, number: int) -> AbstractContextManager[None]:
        """Always there."""
        return nullcontext()

    def end(self) -> AbstractContextManager[None]:
        """Always there."""
        return nullcontext()


class ModelOnDisk:
    """A checkpoint folder as a model without weights, which are read for the part that runs and dropped after it."""

    def __init__(self, folder: Path, source: FolderSource, fixed: bool, attention: str, device: torch.device) -> None:
        """source: of the same folder. Raises CheckpointError where transformers builds no model by its config."""
        self.folder, self.source, self.fixed, self.device = folder, source, fixed, device
        model_class = Qwen2ForCausalLM if fixed else STOCK.Qwen2ForCausalLM
        keyword = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
        options = {"attn_implementation": attention, keyword: torch.float32}  # of rotation tables, before 4.45
        try:
            with quiet(), _Weightless():
                model = build(fixed, model_class._from_config, Qwen2Config.from_pretrained(folder), **options).eval()
        except Qwen2FP16FixError:
            raise
        except Exception as error:  # a bad config ends in whatever transformers trips over, or its validators raise
            raise CheckpointError(
                f"transformers builds no model by the config.json of {folder} ({first_line(error)})."
            ) from None
        self.base: Any = model.model
        self.head: nn.Module | None = model.lm_head
        if hasattr(self.base, "rotary_emb"):
            self.base.rotary_emb.to(device)
        self.tied = bool(source.config.get("tie_word_embeddings", False))

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """The embedding's weights."""
        with self._filled(self.base.embed_tokens, f"{self.source.prefix}embed_tokens"):
            yield

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """A layer's weights, with its exponents and the centre of its keys planned where it is fixed."""
        layer = self.base.layers[number]
        with self._filled(layer, f"{self.source.prefix}layers.{number}"):
            layer.to(self.device)  # the buffers, which are none of the weights
            if self.fixed:
                make_plan(layer)
            yield

    @contextmanager
    def end(self) -> Iterator[None]:
        """The weights of the final norm and the head, which may be the embedding's."""
        head = f"{self.source.prefix}embed_tokens" if self.tied else "lm_head"
        assert self.head is not None
        with self._filled(self.base.norm, f"{self.source.prefix}norm"), self._filled(self.head, head):
            yield

    @contextmanager
    def _filled(self, module: nn.Module, prefix: str) -> Iterator[None]:
        names = [name for name, _ in module.named_parameters()]
        read = {name: self.source.read(f"{prefix}.{name}").to(self.device, torch.float16) for name in names}
        module.load_state_dict(read, strict=False, assign=True)
        del read
        try:
            yield
        finally:
            empty = {name: torch.empty_like(weight, device="meta") for name, weight in module.named_parameters()}
            module.load_state_dict(empty, strict=False, assign=True)


class _Weightless(TorchFunctionMode):
    """Linears and embeddings are built without weights; everything computed, as frequencies are, is real."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return function(*args, **(kwargs | {"device": "meta"} if function is torch.empty else kwargs))


class FullPrecision(TorchFunctionMode):
    """While entered, a float16 model computes in fp32: its embeddings are widened, and each weight as it is used.

    The rest follows by type promotion. No second copy of the model is needed.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As asked, with linears in fp32."""
        kwargs = kwargs or {}
        if function is nn.functional.linear:
            return wide_linear(*args, **kwargs)
        result = function(*args, **kwargs)
        return result.float() if function is nn.functional.embedding else result


def wide_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input (..., in) times weight (out, in) in fp32, some rows of the weight at a time: (..., out)."""
    rows = max(1, CHUNK // weight.shape[1])
    if len(weight) <= rows:
        return nn.functional.linear(input.float(), weight.float(), None if bias is None else bias.float())
    output = torch.empty(*input.shape[:-1], len(weight), dtype=torch.float32, device=input.device)
    wide = input.float()
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        shift = None if bias is None else bias[part].float()
        output[..., part] = nn.functional.linear(wide, weight[part].float(), shift)
    return output


class Stream:
    """The hidden states of every prompt on their way through a model, in its own arithmetic or in fp32."""

    def __init__(self, subject: Subject, prompts: Sequence[Tensor], full_precision: bool = False) -> None:
        """prompts: token ids (1, S) each. The embedding's weights must be there."""
        self.subject, self.full_precision = subject, full_precision
        self.hidden: list[Tensor] = []
        self.calls: list[list[Call]] = []
        with self.running():
            for tokens in prompts:
                calls = record_calls(subject.base, tokens.to(subject.device))
                self.hidden.append(calls[0][0])
                self.calls.append([call for _, call in calls])

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around whatever runs: without gradients, and in fp32 with an attention that stores no scores."""
        with torch.no_grad():
            if self.full_precision:
                with FullPrecision(), fused_attention(self.subject.base):
                    yield
            else:
                yield

    def step(self, number: int, around: Callable[[int], AbstractContextManager[object]]) -> None:
        """Takes every prompt through a layer, inside `around(prompt's index)`."""
        layer = self.subject.base.layers[number]
        for index, call in enumerate(calls[number] for calls in self.calls):
            with self.running(), around(index):
                output = layer(self.hidden[index], *call.args, **call.kwargs)
            self.hidden[index] = output[0] if isinstance(output, tuple) else output

    def normed(self, index: int) -> Tensor:
        """What the final norm makes of a prompt's hidden states: (1, S, hidden)."""
        with self.running():
            normed: Tensor = self.subject.base.norm(self.hidden[index])
        return normed

    def logits(self, normed: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The head's outputs for some tokens at a time, with the position of the first."""
        head = self.subject.head
        if head is None:
            return
        width = getattr(head, "out_features", self.subject.base.config.vocab_size)
        size = max(1, LOGITS // width)
        for start in range(0, normed.shape[1], size):
            with self.running():
                part = head(normed[:, start : start + size])
            yield start, part


def record_calls(base: Any, tokens: Tensor) -> list[tuple[Tensor, Call]]:
    """What the model would call each layer with, were the hidden states its embeddings throughout."""
    real = base.layers
    base.layers = nn.ModuleList(_Passing(layer) for layer in real)
    try:
        base(input_ids=tokens, use_cache=False)
        return [stand_in.__dict__["called"] for stand_in in base.layers]
    finally:
        base.layers = real


class _Passing(nn.Module):
    """Stands in for a layer: notes what it is called with and hands the hidden states on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name in ("attention_type", "layer_type", "sliding_window"):  # which some releases choose the mask by
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
    """Lets attention run through torch's fused kernel, where a release chooses it by its config at every call."""
    if not ALL_ATTENTION_FUNCTIONS:  # before 4.48 by class
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


def is_fixed(base: Any) -> bool:
    """Whether the layers of a Qwen2Model are fixed."""
    return all(known_class(layer, STOCK_OF) for layer in layers_of(base))
