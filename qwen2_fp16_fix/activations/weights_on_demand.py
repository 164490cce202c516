"""The weights of one part of a model at a time. A checkpoint's are read for the part that runs, and dropped after it.

So a checkpoint may be larger than memory. A model in memory has all its weights at any time.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import Qwen2Config

from ..checkpoints.folder import LM_HEAD, FolderSource
from ..checkpoints.loaded_model import output_layers
from ..checkpoints.loading import build, causal_class, checkpoint_at_fault, load_options, quiet
from ..patches.architecture import QWEN2
from ..patches.modeling_qwen2_fp16 import STOCK, STOCK_OF
from ..patches.planning import make_plan
from ..patches.swap import base_models, known_class, layers_of


class WeightProvider(Protocol):
    """A model whose weights are in memory inside these contexts."""

    base: Any
    head: nn.Module | None
    device: torch.device

    def embedding(self) -> AbstractContextManager[None]:
        """For a block that needs the embedding's weights."""

    def layer(self, number: int) -> AbstractContextManager[None]:
        """For a block that needs a layer's weights."""

    def end(self) -> AbstractContextManager[None]:
        """For a block that needs the weights of the final norm and the head."""


class LoadedModel:
    """A model that is loaded: its weights are always there, in memory or by accelerate's hooks."""

    def __init__(self, model: nn.Module) -> None:
        """model: holds a Qwen2Model."""
        base: Any = next(base_models(model, STOCK))
        self.base = base
        self.head: nn.Module | None = next(iter(output_layers(model).values()), None)
        at: torch.device = base.embed_tokens.weight.device
        self.device = torch.device("cpu") if at.type == "meta" else at  # accelerate's hook takes it from anywhere

    def embedding(self) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()

    def layer(self, number: int) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()

    def end(self) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()


class ModelOnDisk:
    """A checkpoint folder as a model without weights. Each part's are read for its run and dropped after it."""

    def __init__(self, folder: Path, source: FolderSource, fixed: bool, attention: str, device: torch.device) -> None:
        """source: of the same folder. Raises CheckpointError if transformers builds no model by its config."""
        self.folder, self.source, self.fixed, self.device = folder, source, fixed, device
        options = load_options(torch.float32, attention)  # the dtype of the rotation tables, before 4.45
        said = f"transformers builds no model by the config.json of {folder}"
        with checkpoint_at_fault(said), quiet(), _Weightless():
            config = Qwen2Config.from_pretrained(folder)
            model = build(fixed, causal_class(fixed)._from_config, config, **options).eval()
        self.base: Any = model.model
        self.head: nn.Module | None = model.lm_head
        if hasattr(self.base, "rotary_emb"):
            self.base.rotary_emb.to(device)

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """For a block that needs the embedding's weights."""
        with self._filled(self.base.embed_tokens, f"{self.source.prefix}embed_tokens"):
            yield

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """For a block that needs a layer's weights. A fixed layer has its exponents and the centre of its keys, too."""
        layer = self.base.layers[number]
        with self._filled(layer, f"{self.source.prefix}layers.{number}"):
            layer.to(self.device)  # moves the buffers; the parameters are there already
            if self.fixed:
                make_plan(layer)
            yield

    @contextmanager
    def end(self) -> Iterator[None]:
        """For a block that needs the weights of the final norm and the head, which may be the embedding's."""
        head = f"{self.source.prefix}embed_tokens" if self.source.tied else LM_HEAD.removesuffix(".weight")
        norm = QWEN2.final_norm()
        assert self.head is not None
        with (
            self._filled(self.base.get_submodule(norm), f"{self.source.prefix}{norm}"),
            self._filled(self.head, head),
        ):
            yield

    @contextmanager
    def _filled(self, module: nn.Module, prefix: str) -> Iterator[None]:
        """The module with its weights, in float16."""
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
    """While entered, linears and embeddings are built without weights.

    Tensors that a constructor computes, such as the frequencies of the rotation, are real.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return function(*args, **(kwargs | {"device": "meta"} if function is torch.empty else kwargs))


def layers_are_fixed(base: Any) -> bool:
    """Whether the layers of a Qwen2Model are fixed."""
    return all(known_class(layer, STOCK_OF) for layer in layers_of(base))
