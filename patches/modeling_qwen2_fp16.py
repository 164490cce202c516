"""Qwen2 and Qwen2.5 that stay finite in float16: drop-in subclasses of transformers' classes, under the same names.

This is the entry file, here and as remote code. It picks the module for the installed transformers release, checks
that the installed source has the shape that module was written for, and lays the fixed parts over the stock ones.
The names stay stock so that saved checkpoints, loss look-up and device maps do too.
"""

import os
import types
import warnings
from typing import Any

import transformers
from torch import nn

# Every sibling is imported here: as remote code from a local folder, transformers before 5.10 copies only these.
from .attention_classes import FlashAttention  # noqa: F401
from .blocks import COMMON_PARTS  # noqa: F401
from .caches import mark_cache
from .configuration_qwen2_fp16 import Qwen2FP16Config
from .errors import UntestedTransformersWarning
from .keys import CentredKeys  # noqa: F401
from .lock import check_when_asked
from .numerics import is_full_precision  # noqa: F401
from .planning import plan_layers
from .range_plan import LayerShape  # noqa: F401
from .scaling import Scaled  # noqa: F401
from .structure import check_structure
from .swap import base_models, check_model, exchange, exchange_all
from .v4_37 import PARTS as PARTS_4_37
from .v4_45 import PARTS as PARTS_4_45
from .v4_48 import PARTS as PARTS_4_48
from .v4_53 import PARTS as PARTS_4_53
from .v4_56 import PARTS as PARTS_4_56
from .v5_4 import PARTS as PARTS_5_4
from .v5_24 import PARTS as PARTS_5_24
from .version_map import NEWEST_TESTED, is_untested, range_for

check_when_asked()
RANGE = range_for(transformers.__version__)  # before the imports below, which releases without Qwen2 cannot serve

from transformers import GenerationMixin  # noqa: E402
from transformers.models.qwen2 import modeling_qwen2 as stock  # noqa: E402

PARTS: dict[str, type[nn.Module]] = {
    "v4_37": PARTS_4_37,
    "v4_45": PARTS_4_45,
    "v4_48": PARTS_4_48,
    "v4_53": PARTS_4_53,
    "v4_56": PARTS_4_56,
    "v5_4": PARTS_5_4,
    "v5_24": PARTS_5_24,
}[RANGE.module]


def beneath(found: Any) -> Any:
    """The stock class under a class of any copy of this file, remote code or package; anything else as it is."""
    if isinstance(found, type) and found.__module__.rpartition(".")[2] == __name__.rpartition(".")[2]:
        return next(base for base in found.__mro__ if base.__module__.startswith("transformers."))
    return found


#: The stock classes, whoever has taken over their names in transformers, before this was imported or later.
ORIGINAL: Any = types.SimpleNamespace(**{name: beneath(thing) for name, thing in vars(stock).items()})
check_structure(ORIGINAL, PARTS, transformers.__version__)
if is_untested(transformers.__version__):
    warnings.warn(
        f"transformers {transformers.__version__} is newer than {NEWEST_TESTED}, the newest release tested with this "
        "fix; its Qwen2 has the known shape, so the fix is applied, untested.",
        UntestedTransformersWarning,
        stacklevel=2,
    )


def is_switched_off() -> bool:
    """Whether the environment says QWEN2_FP16_FIX=0, which leaves every model stock."""
    return os.environ.get("QWEN2_FP16_FIX", "").strip() == "0"


class FixedOnConstruction:
    """Builds the stock model and then exchanges the classes of its parts, so every way of building one is fixed."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """As the stock class."""
        check_when_asked()
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if not is_switched_off():
            check_structure(ORIGINAL, PARTS, transformers.__version__)
            _make_stock(self)  # type: ignore[arg-type]
            exchange_all(self, ORIGINAL, FIXED, built_here=True)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As the stock class; then plans the ranges from the weights that were loaded."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        plan_modules(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class; then plans the ranges anew."""
        loaded = super().load_state_dict(*args, **kwargs)  # type: ignore[misc]
        plan_modules(self)  # type: ignore[arg-type]
        return loaded


def _make_stock(root: nn.Module) -> None:
    """Takes away what another copy of this file has put inside `root`, whose names had replaced stock's."""
    for module in root.modules():
        inner = type(module)
        if module is not root and inner not in STOCK and beneath(inner) is not inner:
            exchange(module, beneath(inner))


class Qwen2Model(FixedOnConstruction, ORIGINAL.Qwen2Model):
    """transformers' Qwen2Model with an fp32 residual stream, fp32 norms, fp32 rotation and, in eager, fp32 scores."""


class Qwen2ForCausalLM(FixedOnConstruction, ORIGINAL.Qwen2ForCausalLM, GenerationMixin):
    """transformers' Qwen2ForCausalLM over the fixed Qwen2Model."""


class Qwen2ForSequenceClassification(FixedOnConstruction, ORIGINAL.Qwen2ForSequenceClassification):
    """transformers' Qwen2ForSequenceClassification over the fixed Qwen2Model."""


if hasattr(stock, "Qwen2ForTokenClassification"):  # from 4.42

    class Qwen2ForTokenClassification(FixedOnConstruction, ORIGINAL.Qwen2ForTokenClassification):
        """transformers' Qwen2ForTokenClassification over the fixed Qwen2Model."""


if hasattr(stock, "Qwen2ForQuestionAnswering"):  # from 4.46.1

    class Qwen2ForQuestionAnswering(FixedOnConstruction, ORIGINAL.Qwen2ForQuestionAnswering):
        """transformers' Qwen2ForQuestionAnswering over the fixed Qwen2Model."""


def _fixed_part(name: str) -> type[nn.Module]:
    """The part of that name laid over the stock class, under the stock name and importable from here."""
    bases = (PARTS[name], getattr(stock, name))
    known = globals().get(name)
    if getattr(known, "__bases__", None) == bases:
        return known  # type: ignore[return-value]  # 4.40 to 4.46 run remote code anew for each load of a model
    part = type(name, bases, {"__module__": __name__, "__doc__": PARTS[name].__doc__})
    globals()[name] = part
    return part


#: Stock class to fixed class, for the parts. Models keep their class: transformers 5 looks up by it what to record.
FIXED: dict[type, type] = {getattr(stock, name): _fixed_part(name) for name in PARTS}
STOCK: dict[type, type] = {fixed: original for original, fixed in FIXED.items()}

#: Stock model class to drop-in class, for the models this release has.
MODELS: dict[type, type] = {
    getattr(ORIGINAL, name): model
    for name, model in list(globals().items())
    if isinstance(model, type) and issubclass(model, FixedOnConstruction) and hasattr(stock, name)
}


def _remote_model(model: type, prefix: str, config: type) -> type:
    """A drop-in class for remote code, named so that no engine takes the checkpoint for one of its own Qwen2."""
    name = model.__name__.replace("Qwen2", prefix)
    # As a direct base: without one, transformers from 4.45 builds another class around what generates.
    bases = (model, GenerationMixin) if issubclass(model, GenerationMixin) else (model,)
    remote = type(name, bases, {"__module__": __name__, "__doc__": model.__doc__, "config_class": config})
    # What makes save_pretrained save this code too: Auto classes set it, but for local folders in 4.45 to 4.52.
    remote._auto_class = f"AutoModel{name.removeprefix(prefix).removeprefix('Model')}"  # type: ignore[attr-defined]
    globals()[name] = remote
    return remote


#: What `auto_map` names: Qwen2FP16Model, Qwen2FP16ForCausalLM, … and, for checkpoints with a model type of their own,
#: Qwen2FP16StrictModel, Qwen2FP16StrictForCausalLM, …: the Auto classes compare the configuration's class.
REMOTE: tuple[type, ...] = tuple(
    _remote_model(model, prefix, config)
    for prefix, config in (("Qwen2FP16", ORIGINAL.Qwen2Config), ("Qwen2FP16Strict", Qwen2FP16Config))
    for model in MODELS.values()
)


def fix_modules(root: nn.Module) -> None:
    """Fixes every Qwen2 inside `root` in place. Raises, and changes nothing, where one cannot be fixed whole."""
    check_when_asked()
    check_structure(ORIGINAL, PARTS, transformers.__version__)
    exchange_all(root, ORIGINAL, FIXED, then=plan_modules)


def plan_modules(root: nn.Module) -> None:
    """Plans the ranges of every fixed Qwen2 inside `root` from its weights as they are now."""
    for base in base_models(root, ORIGINAL):
        if all(type(layer) in STOCK for layer in base.layers):  # type: ignore[union-attr]
            plan_layers(base)


def adopt_cache(root: nn.Module, cache: Any, centred: bool) -> None:
    """Marks a cache as holding keys of the Qwen2 inside `root`, centred as it centres them, or else uncentred ones."""
    check_modules(root)
    for base in base_models(root, ORIGINAL):
        mark_cache(base, cache, centred)


def unfix_modules(root: nn.Module) -> None:
    """Makes every Qwen2 inside `root` stock again, bit for bit."""
    exchange_all(root, ORIGINAL, STOCK)


def check_modules(root: nn.Module) -> None:
    """Raises where `fix_modules` would, but for weights that are not there."""
    check_structure(ORIGINAL, PARTS, transformers.__version__)
    check_model(root, ORIGINAL, {*FIXED, *STOCK})
