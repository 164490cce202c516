"""Qwen2 and Qwen2.5 that stay finite in float16: drop-in subclasses of transformers' classes, under the same names.

This is the entry file, here and as remote code. It picks the module for the installed transformers release, checks
that the installed source has the shape that module was written for, and lays the fixed parts over the stock ones.
The names stay stock so that saved checkpoints, loss look-up and device maps do too.
"""

import contextlib
import os
import types
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import transformers
from torch import nn

# Every sibling is imported here: as remote code from a local folder, transformers before 5.10 copies only these.
from .architecture import Architecture  # noqa: F401
from .attention_classes import FlashAttention  # noqa: F401
from .blocks import COMMON_PARTS  # noqa: F401
from .caches import mark_cache
from .configuration_qwen2_fp16 import Qwen2FP16Config
from .errors import UntestedTransformersWarning
from .keys import CentredKeys  # noqa: F401
from .linears import load_problem, note_missing  # noqa: F401
from .lock import check_when_asked
from .numerics import is_full_precision  # noqa: F401
from .overflow import OverflowWatch  # noqa: F401
from .planning import expect_plans, plan_layers
from .range_plan import LayerShape  # noqa: F401
from .scaling import Scaled  # noqa: F401
from .structure import check_structure
from .swap import base_models, check_model, exchange, exchange_all, known_class, layers_of
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


_stock_wanted: ContextVar[bool] = ContextVar("qwen2_fp16_fix_stock_wanted", default=False)


@contextlib.contextmanager
def stock_models() -> Iterator[None]:
    """Lets this thread build stock models for the length of a with block, whatever is registered.

    That goes for the Auto classes and every class by its name; what is built already stays as it is, and `fix` works.
    """
    before = _stock_wanted.set(True)
    try:
        yield
    finally:
        _stock_wanted.reset(before)


def stock_is_wanted() -> bool:
    """Whether this thread is inside `stock_models`."""
    return _stock_wanted.get()


class FixedOnConstruction:
    """Builds the stock model and then exchanges the classes of its parts, so every way of building one is fixed."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """As the stock class."""
        check_when_asked()
        with stock_models():  # what is inside is fixed with the whole
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        fix_built(self)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Names a drop-in class by the file it is in: a pickle would find stock's under its `__module__`."""
        whole: Any = super().__reduce_ex__(max(protocol, 2))
        made, arguments, *state = whole
        if type(self) in MODELS.values():
            made, arguments = _unpickled, (type(self).__name__,)
        return (made, arguments, *state)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As the stock class; then plans the ranges from the weights that were loaded."""
        tells = kwargs.pop("output_loading_info", False)
        loaded, told = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        note_made_up(loaded, told)
        plan_modules(loaded)
        return (loaded, told) if tells else loaded

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class; then plans the ranges anew."""
        loaded = super().load_state_dict(*args, **kwargs)  # type: ignore[misc]
        plan_modules(self)  # type: ignore[arg-type]
        return loaded


def note_made_up(root: nn.Module, told: Any) -> None:
    """Notes in each layer of `root` which parameters from_pretrained says that it has not loaded."""
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in told.get("mismatched_keys") or ()]
    names = [*(told.get("missing_keys") or ()), *mismatched]
    for base in base_models(root, ORIGINAL):
        for index, layer in enumerate(layers_of(base)):
            parts = [f".{name}".partition(f".layers.{index}.") for name in sorted(names)]
            note_missing(layer, [rest for _, _, rest in parts if rest])


def fix_built(root: nn.Module) -> None:
    """Fixes a Qwen2 at the end of its construction, unless the environment or the thread wants it stock.

    Raises as `fix_modules`, but for weights, which may come later.
    """
    check_when_asked()
    if is_switched_off() or stock_is_wanted():
        return
    check_structure(ORIGINAL, PARTS, transformers.__version__)
    _make_stock(root)
    exchange_all(root, ORIGINAL, FIXED, built_here=True, then=expect_plans_in)


def _unpickled(name: str) -> Any:
    """An instance of the drop-in class of that name, whose state is still to be set."""
    return globals()[name].__new__(globals()[name])


def _make_stock(root: nn.Module) -> None:
    """Takes away what another copy of this file has put inside `root`, whose names had replaced stock's."""
    for module in root.modules():
        inner = type(module)
        if module is not root and inner not in STOCK and beneath(inner) is not inner:
            exchange(module, beneath(inner))


#: The module that the drop-in classes say they are of: stock's. By it transformers lets a checkpoint's own code go
#: before them, as before its own classes (from 5.5), and PEFT's adapters, which name it, are read without this code.
#: As remote code it is this one, whose files save_pretrained then copies.
HOME = __name__ if __name__.startswith("transformers_modules.") else stock.__name__


class Qwen2Model(FixedOnConstruction, ORIGINAL.Qwen2Model):
    """transformers' Qwen2Model with an fp32 residual stream, fp32 norms, fp32 rotation and, in eager, fp32 scores."""

    __module__ = HOME


class Qwen2ForCausalLM(FixedOnConstruction, ORIGINAL.Qwen2ForCausalLM, GenerationMixin):
    """transformers' Qwen2ForCausalLM over the fixed Qwen2Model."""

    __module__ = HOME


class Qwen2ForSequenceClassification(FixedOnConstruction, ORIGINAL.Qwen2ForSequenceClassification):
    """transformers' Qwen2ForSequenceClassification over the fixed Qwen2Model."""

    __module__ = HOME


if hasattr(stock, "Qwen2ForTokenClassification"):  # from 4.42

    class Qwen2ForTokenClassification(FixedOnConstruction, ORIGINAL.Qwen2ForTokenClassification):
        """transformers' Qwen2ForTokenClassification over the fixed Qwen2Model."""

        __module__ = HOME


if hasattr(stock, "Qwen2ForQuestionAnswering"):  # from 4.46.1

    class Qwen2ForQuestionAnswering(FixedOnConstruction, ORIGINAL.Qwen2ForQuestionAnswering):
        """transformers' Qwen2ForQuestionAnswering over the fixed Qwen2Model."""

        __module__ = HOME


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
        if all(known_class(layer, STOCK) for layer in layers_of(base)):
            plan_layers(base)


def expect_plans_in(root: nn.Module) -> None:
    """Lets every layer of every Qwen2 inside `root` plan itself at its next forward."""
    for base in base_models(root, ORIGINAL):
        expect_plans(base)


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
