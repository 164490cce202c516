"""The weights of a model in memory by name, and such a model saved as a checkpoint."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..code_copies import code_of, is_plain_linear, sibling
from ..errors import CheckpointError, first_line
from ..patches.architecture import QWEN2
from ..patches.errors import NotQwen2Error
from ..patches.modeling_qwen2_fp16 import STOCK
from ..patches.planning import layer_shape
from ..patches.scaling import FLOAT_DTYPES
from ..patches.swap import base_models
from ..patches.version_map import NUMERICS
from .loading import quiet
from .weights import LINEARS, OUTPUT_LAYERS, ROWS_READ, UnboundedWeightError, check_values, older_code, weight_names

NORMS = (QWEN2.final_norm(), *QWEN2.norms())


class ModelSource:
    """The weights of a loaded model, by the names they have in a base model's checkpoint."""

    prefix = ""

    def __init__(self, root: nn.Module) -> None:
        """root: any module; its first Qwen2Model counts. Raises NotQwen2Error if there is none."""
        bases = list(base_models(root, STOCK))
        if not bases:
            raise NotQwen2Error(
                f"found no Qwen2 in this {type(root).__qualname__}: pass a Qwen2 model or a checkpoint."
            )
        base: Any = bases[0]
        self.base = base
        self.warnings = tuple(_warnings(bases))
        self.outputs = output_layers(root)
        self.layers = len(base.layers)
        self.shape = layer_shape(base.layers[0], getattr(base, "rotary_emb", None))
        self.intermediate: int = base.config.intermediate_size

    def layer_names(self, number: int) -> list[str]:
        """Norms, linears and their biases. Raises UnboundedWeightError for a bias that a Qwen2 does not have."""
        biased = [linear for linear in QWEN2.linears if self.has(f"layers.{number}.{linear.name}.bias")]
        for linear in biased:
            if not linear.bias:
                raise UnboundedWeightError(f"{linear.name} has a bias, which is not bounded here")
        return weight_names() + [f"{linear.name}.bias" for linear in biased]

    def heads(self) -> list[str]:
        """The weights of the output layers."""
        return [f"{name}.weight" for name in self.outputs]

    def has(self, name: str) -> bool:
        """Whether there is such a parameter."""
        owner, _, kind = name.rpartition(".")
        return getattr(self._module(owner), kind, None) is not None

    def rows(self, name: str) -> Iterator[Tensor]:
        """The weight, some rows at a time."""
        yield from torch.split(self.read(name), ROWS_READ)

    def read(self, name: str) -> Tensor:
        """A weight. Raises UnboundedWeightError if it is wrapped, quantised or not loaded."""
        owner, _, kind = name.rpartition(".")
        module = self._module(owner)
        is_plain = type(module) is nn.Embedding if owner == "embed_tokens" else is_plain_linear(module)
        if not owner.endswith(NORMS) and not is_plain:
            raise UnboundedWeightError(f"{owner} is a {type(module).__name__}, whose weights cannot be bounded here")
        return check_values(name, getattr(module, kind))

    def _module(self, owner: str) -> Any:
        return self.outputs[owner] if owner in self.outputs else self.base.get_submodule(owner)


def _warnings(bases: list[Any]) -> Iterator[str]:
    """Reasons why the weights of the first base model do not describe the whole model."""
    if len(bases) > 1:
        yield f"it holds {len(bases)} Qwen2 models: certify each by itself"
    if type(bases[0]).forward is not STOCK.Qwen2Model.forward:
        yield f"{type(bases[0]).__qualname__} has a forward of its own, which is not bounded here"
    numerics = sibling(code_of(bases[0]), "version_map").NUMERICS
    if numerics != NUMERICS:
        yield older_code(numerics)


def output_layers(root: nn.Module) -> dict[str, Any]:
    """The first module of each name in OUTPUT_LAYERS, however deep inside `root`."""
    found: dict[str, Any] = {}
    for module in root.modules():
        for name in OUTPUT_LAYERS:
            head = getattr(module, name, None)
            if isinstance(head, nn.Module):
                found.setdefault(name, head)
    return found


@contextmanager
def saved(model: nn.Module) -> Iterator[Path]:
    """A loaded model as a checkpoint in a temporary folder. Raises CheckpointError or NotQwen2Error."""
    _check_loaded(model)
    with tempfile.TemporaryDirectory(prefix="qwen2-fp16-fix-", ignore_cleanup_errors=True) as folder:
        try:
            with quiet():
                model.save_pretrained(folder)  # type: ignore[operator]
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"transformers cannot save this model ({first_line(error)}).") from None
        yield Path(folder)


def _check_loaded(model: Any) -> None:
    """Raises CheckpointError or NotQwen2Error if the saved model would compute other numbers than this one."""
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise CheckpointError("this model has a PEFT adapter: merge it (merge_and_unload), then verify the model.")
    if not isinstance(model, STOCK.Qwen2ForCausalLM):
        raise NotQwen2Error(f"this is a {type(model).__qualname__}: verify takes a Qwen2ForCausalLM, or its folder.")
    for module, stock in ((model, STOCK.Qwen2ForCausalLM), (model.model, STOCK.Qwen2Model)):
        if type(module).forward is not stock.forward:
            raise CheckpointError(
                f"{type(module).__qualname__} has a forward of its own: verify builds transformers' Qwen2 "
                "from the weights, which is another model."
            )
    if getattr(model.config, "quantization_config", None):
        raise CheckpointError("this model is quantised, so there is no fp32 to compare with: load it unquantised.")
    for name, module in model.named_modules():
        if name.endswith(LINEARS) and not is_plain_linear(module):
            raise CheckpointError(f"{name} is a {type(module).__name__}: verify takes a model of plain linear layers.")
    for name, weight in model.named_parameters():
        if weight.is_meta or weight.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{name} is quantised or not loaded: verify takes a model with its weights in place.")
