"""Qwen2 and Qwen2.5 that stay finite in float16: drop-in subclasses of transformers' classes, under the same names.

This is the entry file, here and as remote code. It picks the module for the installed transformers release, checks
that the installed source has the shape that the module was written for, and makes the fixed classes. They keep stock's
names, which saved checkpoints, device maps and transformers' table of losses refer to.
"""

import types
from typing import Any

import transformers
from torch import nn

# Every sibling is imported here. Remote code depends on it: of a local folder, transformers before 5.10 copies only the
# files that the entry imports. tests/hub/test_export.py, test_the_entry_file_imports_every_sibling.
# At each load it reads a file once for every chain of such imports that ends there. So where chains are long a sibling
# writes `from . import sibling`, which transformers does not follow: test_a_load_reads_few_files.
from .architecture import QWEN2
from .attention import eager_attention  # noqa: F401
from .attention_classes import FlashAttention  # noqa: F401
from .attention_form import claim_keys  # noqa: F401
from .autocast import is_full_precision  # noqa: F401
from .autograd import backward_through  # noqa: F401
from .blocks import COMMON_PARTS  # noqa: F401
from .cache_origin import Witness  # noqa: F401
from .cached_keys import stored_keys  # noqa: F401
from .caches import mark_cache
from .configuration_qwen2_fp16 import Qwen2FP16Config
from .errors import Qwen2FP16FixError  # noqa: F401
from .key_centring import CentredKeys  # noqa: F401
from .layer_plan import Plan  # noqa: F401
from .linears import load_problem, note_made_up  # noqa: F401
from .loaded_code import other_code  # noqa: F401
from .lock import check_when_asked, is_switched_off
from .lock_file import read_lock  # noqa: F401
from .numerics import rotate  # noqa: F401
from .overflow import OverflowWatch  # noqa: F401
from .planning import expect_plans, plan_layers
from .projections import rotated_projections  # noqa: F401
from .range_bounds import LayerShape  # noqa: F401
from .range_plan import plan_layer  # noqa: F401
from .range_sums import linear_sums  # noqa: F401
from .replaced import WATCHED
from .rotary import RotaryEmbedding  # noqa: F401
from .scaling import Scaled  # noqa: F401
from .sdpa import sdpa_attention  # noqa: F401
from .source_files import code_digests  # noqa: F401
from .stock_wanted import stock_is_wanted, stock_models
from .structure import check_structure, warn_if_untested
from .swap import NAME_BEFORE, base_models, check_model, exchange, exchange_all, known_class, layers_of
from .symbolic import is_symbolic  # noqa: F401
from .two_part_keys import Split  # noqa: F401
from .upstream_code import upstream_digests  # noqa: F401
from .v4_37 import PARTS as PARTS_4_37
from .v4_45 import PARTS as PARTS_4_45
from .v4_48 import PARTS as PARTS_4_48
from .v4_53 import PARTS as PARTS_4_53
from .v4_56 import PARTS as PARTS_4_56
from .v5_4 import PARTS as PARTS_5_4
from .v5_24 import PARTS as PARTS_5_24
from .version_map import range_for

check_when_asked()
RANGE = range_for(transformers.__version__)  # before the imports below, which fail on releases without Qwen2

from transformers import GenerationMixin  # noqa: E402
from transformers.models.qwen2 import modeling_qwen2  # noqa: E402

PARTS: dict[str, type[nn.Module]] = {
    "v4_37": PARTS_4_37,
    "v4_45": PARTS_4_45,
    "v4_48": PARTS_4_48,
    "v4_53": PARTS_4_53,
    "v4_56": PARTS_4_56,
    "v5_4": PARTS_5_4,
    "v5_24": PARTS_5_24,
}[RANGE.module]


def stock_class_of(found: Any) -> Any:
    """The stock class of a class that any copy of this file has made; anything else is returned as it is."""
    if isinstance(found, type) and found.__module__.rpartition(".")[2] == __name__.rpartition(".")[2]:
        return next(base for base in found.__mro__ if base.__module__.startswith("transformers."))
    return found


#: transformers' own Qwen2 classes by name, even where another copy of this file has replaced them there.
STOCK: Any = types.SimpleNamespace(**{name: stock_class_of(thing) for name, thing in vars(modeling_qwen2).items()})
check_structure(STOCK, PARTS, transformers.__version__)
warn_if_untested(transformers.__version__)


class FixedOnConstruction:
    """Builds the stock model and then exchanges the classes of its parts, so every way of building one is fixed."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """As the stock class."""
        check_when_asked()
        with stock_models():  # the models inside are fixed together with this one, below
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        fix_built(self)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles a drop-in class by the file that defines it: under its `__module__` there is stock's class."""
        whole: Any = super().__reduce_ex__(max(protocol, 2))
        made, arguments, *state = whole
        if type(self) in DROP_IN_OF.values():
            made, arguments = _unpickled, (type(self).__name__,)
        return (made, arguments, *state)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As the stock class; then plans the ranges from the weights that were loaded."""
        tells = kwargs.pop("output_loading_info", False)
        loaded, told = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        note_made_up(loaded, STOCK, told)
        plan_modules(loaded)
        return (loaded, told) if tells else loaded

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class; then plans the ranges again."""
        loaded = super().load_state_dict(*args, **kwargs)  # type: ignore[misc]
        plan_modules(self)  # type: ignore[arg-type]
        return loaded


def fix_built(root: nn.Module) -> None:
    """Fixes a Qwen2 at the end of its construction, unless the environment or the thread wants it stock.

    Raises what `fix_modules` raises, except MetaTensorError: weights may be loaded later.
    """
    check_when_asked()
    if is_switched_off() or stock_is_wanted():
        return
    check_structure(STOCK, PARTS, transformers.__version__)
    _make_stock(root)
    exchange_all(root, STOCK, FIXED_OF, built_here=True, then=expect_plans_in)


def _unpickled(name: str) -> Any:
    """An instance of the drop-in class of that name, without its state."""
    return globals()[name].__new__(globals()[name])


def _make_stock(root: nn.Module) -> None:
    """Gives the modules inside `root` that another copy of this file has fixed their stock classes back."""
    for module in root.modules():
        inner = type(module)
        if module is not root and inner not in STOCK_OF and stock_class_of(inner) is not inner:
            exchange(module, stock_class_of(inner))


#: The `__module__` of the drop-in classes. In the package it is stock's: from 5.5 transformers prefers a checkpoint's
#: code to them, as to its own classes. A PEFT adapter, whose configuration names it, loads without this package. As
#: remote code it is this module, whose files save_pretrained copies.
HOME = __name__ if __name__.startswith("transformers_modules.") else modeling_qwen2.__name__


class Qwen2Model(FixedOnConstruction, STOCK.Qwen2Model):
    """transformers' Qwen2Model with an fp32 residual stream, fp32 norms, fp32 rotation and, in eager, fp32 scores."""

    __module__ = HOME


class Qwen2ForCausalLM(FixedOnConstruction, STOCK.Qwen2ForCausalLM, GenerationMixin):
    """transformers' Qwen2ForCausalLM over the fixed Qwen2Model."""

    __module__ = HOME


class Qwen2ForSequenceClassification(FixedOnConstruction, STOCK.Qwen2ForSequenceClassification):
    """transformers' Qwen2ForSequenceClassification over the fixed Qwen2Model."""

    __module__ = HOME


if hasattr(STOCK, "Qwen2ForTokenClassification"):  # from 4.42

    class Qwen2ForTokenClassification(FixedOnConstruction, STOCK.Qwen2ForTokenClassification):
        """transformers' Qwen2ForTokenClassification over the fixed Qwen2Model."""

        __module__ = HOME


if hasattr(STOCK, "Qwen2ForQuestionAnswering"):  # from 4.46.1

    class Qwen2ForQuestionAnswering(FixedOnConstruction, STOCK.Qwen2ForQuestionAnswering):
        """transformers' Qwen2ForQuestionAnswering over the fixed Qwen2Model."""

        __module__ = HOME


def make_class(name: str, bases: tuple[type, ...], **attributes: Any) -> type:
    """A class of this module, made when it is imported.

    It is not a class statement, since its name and bases depend on the installed release. Pickle and transformers look
    for it here by name. The same bases give the same class: 4.40 to 4.46 run remote code again for each load of a
    model.
    """
    known = globals().get(name)
    if isinstance(known, type) and known.__bases__ == bases:
        return known
    made = globals()[name] = type(name, bases, {"__module__": __name__, "__doc__": bases[0].__doc__, **attributes})
    return made


def _fixed_part(name: str, part: Any) -> type:
    """The fixed class of a part. Older copies of this file call its `on_unfixed` by the name it had before."""
    alias = {NAME_BEFORE: part.on_unfixed} if hasattr(part, "on_unfixed") else {}
    return make_class(name, (part, getattr(STOCK, name)), **alias)


#: Stock class to fixed class of each part, and back. `fix` leaves a model its class, by which transformers 5 looks up
#: what to record.
FIXED_OF: dict[type, type] = {getattr(STOCK, name): _fixed_part(name, part) for name, part in PARTS.items()}
STOCK_OF: dict[type, type] = {fixed: stock for stock, fixed in FIXED_OF.items()}
#: A fixed layer runs stock's forward; the other parts have their own.
WATCHED.begin(modeling_qwen2, tuple(kind for kind in FIXED_OF if kind.__name__ != QWEN2.stock_name("layer")))

#: Stock class to drop-in class, for the models that this release has.
DROP_IN_OF: dict[type, type] = {
    getattr(STOCK, name): model
    for name, model in list(globals().items())
    if isinstance(model, type) and issubclass(model, FixedOnConstruction) and hasattr(STOCK, name)
}


def _remote_model(model: type, prefix: str, config: type) -> type:
    """A drop-in class for remote code. No engine knows its name, so none runs its own Qwen2 instead."""
    name = model.__name__.replace("Qwen2", prefix)
    # GenerationMixin is a direct base: without it, from 4.45 transformers wraps a generating class in another one.
    bases = (model, GenerationMixin) if issubclass(model, GenerationMixin) else (model,)
    # save_pretrained copies the code only if this is set. Auto classes do, except for local folders in 4.45 to 4.52.
    auto_class = f"AutoModel{name.removeprefix(prefix).removeprefix('Model')}"
    return make_class(name, bases, config_class=config, _auto_class=auto_class)


#: The classes that `auto_map` names: Qwen2FP16Model, Qwen2FP16ForCausalLM, … and, for checkpoints with a model type of
#: their own, Qwen2FP16StrictModel, Qwen2FP16StrictForCausalLM, …: the Auto classes compare the configuration's class.
REMOTE: tuple[type, ...] = tuple(
    _remote_model(model, prefix, config)
    for prefix, config in (("Qwen2FP16", STOCK.Qwen2Config), ("Qwen2FP16Strict", Qwen2FP16Config))
    for model in DROP_IN_OF.values()
)


def fix_modules(root: nn.Module) -> None:
    """Fixes every Qwen2 inside `root` in place. Raises, and changes nothing, if one cannot be fixed whole."""
    check_when_asked()
    check_structure(STOCK, PARTS, transformers.__version__)
    exchange_all(root, STOCK, FIXED_OF, then=plan_modules)


def plan_modules(root: nn.Module) -> None:
    """Plans the ranges of every fixed Qwen2 inside `root` from its weights as they are now."""
    for base in base_models(root, STOCK):
        if all(known_class(layer, STOCK_OF) for layer in layers_of(base)):
            plan_layers(base)


def expect_plans_in(root: nn.Module) -> None:
    """Lets every layer of every Qwen2 inside `root` plan itself at its next forward."""
    for base in base_models(root, STOCK):
        expect_plans(base)


def adopt_cache(root: nn.Module, cache: Any, centred: bool) -> None:
    """Marks a cache as holding keys that the Qwen2 inside `root` has centred; or uncentred ones, if not `centred`."""
    check_modules(root)
    for base in base_models(root, STOCK):
        mark_cache(base, cache, centred)


def unfix_modules(root: nn.Module) -> None:
    """Makes every Qwen2 inside `root` stock again, bit for bit."""
    exchange_all(root, STOCK, STOCK_OF)


def check_modules(root: nn.Module) -> None:
    """Raises what `fix_modules` raises, except MetaTensorError."""
    check_structure(STOCK, PARTS, transformers.__version__)
    check_model(root, STOCK, {*FIXED_OF, *STOCK_OF})
