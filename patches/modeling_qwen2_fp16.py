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
from .errors import UntestedTransformersWarning
from .keys import CentredKeys  # noqa: F401
from .numerics import is_full_precision  # noqa: F401
from .planning import plan_layers
from .range_plan import LayerShape  # noqa: F401
from .scaling import Scaled  # noqa: F401
from .structure import check_structure
from .swap import base_models, check_model, exchange_all
from .v4_37 import PARTS as PARTS_4_37
from .v4_45 import PARTS as PARTS_4_45
from .v4_48 import PARTS as PARTS_4_48
from .v4_53 import PARTS as PARTS_4_53
from .v4_56 import PARTS as PARTS_4_56
from .v5_4 import PARTS as PARTS_5_4
from .v5_24 import PARTS as PARTS_5_24
from .version_map import NEWEST_TESTED, is_untested, range_for

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

#: The stock classes as they were when this was imported: their names in transformers may be taken over later.
ORIGINAL = types.SimpleNamespace(**vars(stock))
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
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if not is_switched_off():
            check_structure(ORIGINAL, PARTS, transformers.__version__)
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


class Qwen2Model(FixedOnConstruction, stock.Qwen2Model):
    """transformers' Qwen2Model with an fp32 residual stream, fp32 norms, fp32 rotation and, in eager, fp32 scores."""


class Qwen2ForCausalLM(FixedOnConstruction, stock.Qwen2ForCausalLM, GenerationMixin):
    """transformers' Qwen2ForCausalLM over the fixed Qwen2Model."""


class Qwen2ForSequenceClassification(FixedOnConstruction, stock.Qwen2ForSequenceClassification):
    """transformers' Qwen2ForSequenceClassification over the fixed Qwen2Model."""


if hasattr(stock, "Qwen2ForTokenClassification"):  # from 4.42

    class Qwen2ForTokenClassification(FixedOnConstruction, stock.Qwen2ForTokenClassification):
        """transformers' Qwen2ForTokenClassification over the fixed Qwen2Model."""


if hasattr(stock, "Qwen2ForQuestionAnswering"):  # from 4.46.1

    class Qwen2ForQuestionAnswering(FixedOnConstruction, stock.Qwen2ForQuestionAnswering):
        """transformers' Qwen2ForQuestionAnswering over the fixed Qwen2Model."""


def _fixed_part(name: str) -> type[nn.Module]:
    """The part of that name laid over the stock class, under the stock name and importable from here."""
    part = type(name, (PARTS[name], getattr(stock, name)), {"__module__": __name__, "__doc__": PARTS[name].__doc__})
    globals()[name] = part
    return part


#: Stock class to fixed class, for the parts. Models keep their class: transformers 5 looks up by it what to record.
FIXED: dict[type, type] = {getattr(stock, name): _fixed_part(name) for name in PARTS}
STOCK: dict[type, type] = {fixed: original for original, fixed in FIXED.items()}

#: Stock model class to drop-in class, for the models this release has.
MODELS: dict[type, type] = {
    getattr(stock, name): model
    for name, model in list(globals().items())
    if isinstance(model, type) and issubclass(model, FixedOnConstruction) and hasattr(stock, name)
}


def fix_modules(root: nn.Module) -> None:
    """Fixes every Qwen2 inside `root` in place. Raises, and changes nothing, where one cannot be fixed whole."""
    check_structure(ORIGINAL, PARTS, transformers.__version__)
    exchange_all(root, ORIGINAL, FIXED)
    plan_modules(root)


def plan_modules(root: nn.Module) -> None:
    """Plans the ranges of every fixed Qwen2 inside `root` from its weights as they are now."""
    for base in base_models(root, ORIGINAL):
        if all(type(layer) in STOCK for layer in base.layers):  # type: ignore[union-attr]
            plan_layers(base)


def unfix_modules(root: nn.Module) -> None:
    """Makes every Qwen2 inside `root` stock again, bit for bit."""
    exchange_all(root, ORIGINAL, STOCK)


def check_modules(root: nn.Module) -> None:
    """Raises where `fix_modules` would, but for weights that are not there."""
    check_structure(ORIGINAL, PARTS, transformers.__version__)
    check_model(root, ORIGINAL, {*FIXED, *STOCK})
