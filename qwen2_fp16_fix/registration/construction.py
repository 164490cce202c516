"""Fixes a Qwen2 that is built by its class's own name, by a subclass, or by code that came with a checkpoint.

`watch` wraps the `__init__` of transformers' Qwen2Model and of the classes derived from it. At the end of its
construction a model is fixed if its parts are Qwen2's; a warning names it if they are not. `unwatch` puts everything
back. No name is rebound and no class takes another's place.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.models.auto import auto_factory

from ..patches.errors import NotFixedWarning, PatchConflictError, Qwen2FP16FixError
from ..patches.lock import is_switched_off
from ..patches.modeling_qwen2_fp16 import STOCK, fix_built
from ..patches.stock_wanted import stock_is_wanted
from ..patches.swap import base_models

BUILDING = "_qwen2_fp16_fix_building"  # in an instance while its constructor runs
MISSING = object()  # stands for an attribute or an entry that was not there
#: Owner, name, the owner's own attribute before or MISSING, the one it was given.
_replaced: list[tuple[Any, str, Any, Any]] = []
#: The wrapped constructors that judge the models they have built.
_watching: set[Any] = set()


def watch() -> None:
    """From here on every Qwen2Model is fixed at the end of its construction, or a warning says that it is not."""
    base = STOCK.Qwen2PreTrainedModel  # of Qwen2Model, its heads, and other models made of Qwen2's parts

    def __init_subclass__(cls: type, /, **kwargs: Any) -> None:
        super(base, cls).__init_subclass__(**kwargs)
        if is_watching():
            _watch_class(cls, _judge_for(cls))

    for kind in _derived(base):
        _watch_class(kind, _judge_for(kind))
    _replace(base, "__init_subclass__", classmethod(__init_subclass__))
    _replace(
        auto_factory, "get_class_from_dynamic_module", _watching_classes(auto_factory.get_class_from_dynamic_module)
    )


def unwatch() -> None:
    """Puts back everything that `watch` has replaced.

    If another tool has wrapped one of our functions, both stay in place, and ours does nothing.
    """
    _watching.clear()
    for owner, name, before, ours in reversed(_replaced):
        if vars(owner).get(name) is ours:
            delattr(owner, name) if before is MISSING else setattr(owner, name, before)
    _replaced.clear()


def is_watching() -> bool:
    """Whether `watch` is in force."""
    return bool(_replaced)


def _replace(owner: Any, name: str, ours: Any) -> None:
    _replaced.append((owner, name, vars(owner).get(name, MISSING), ours))
    setattr(owner, name, ours)


def _derived(kind: type) -> list[type]:
    """Every class derived from `kind` so far."""
    direct: list[type] = kind.__subclasses__()
    return [*direct, *(found for child in direct for found in _derived(child))]


def _watch_class(kind: Any, judge: Callable[[Any], None]) -> None:
    """Calls `judge` with each model that this class builds. Leaves a drop-in class as it is: it fixes itself."""
    build = kind.__init__
    if build in _watching or _fixes_itself(kind):
        return

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if BUILDING in self.__dict__ or __init__ not in _watching:  # called by the constructor of a derived class
            build(self, *args, **kwargs)
            return
        self.__dict__[BUILDING] = True
        try:
            build(self, *args, **kwargs)
        finally:
            self.__dict__.pop(BUILDING, None)
        judge(self)

    _watching.add(__init__)
    _replace(kind, "__init__", __init__)


def _watching_classes(fetch: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `fetch`, by which Auto classes get the class of a checkpoint's own code, so that the class is watched."""

    @functools.wraps(fetch)
    def get_class_from_dynamic_module(*args: Any, **kwargs: Any) -> Any:
        found = fetch(*args, **kwargs)
        if (
            is_watching()
            and get_class_from_dynamic_module in _watching
            and isinstance(found, type)
            and issubclass(found, nn.Module)
        ):
            _watch_class(found, _judge_checkpoints_own)
        return found

    _watching.add(get_class_from_dynamic_module)
    return get_class_from_dynamic_module


def _fixes_itself(kind: type) -> bool:
    """Whether this is a drop-in class, of this copy of `patches/` or of any other."""
    return any(base.__name__ == "FixedOnConstruction" for base in kind.__mro__)


def _judge_for(kind: type) -> Callable[[Any], None]:
    """The function that judges the models of this class."""
    return _judge if issubclass(kind, STOCK.Qwen2Model) else _judge_stack


def _judge_stack(model: Any) -> None:
    """Fixes a model that holds Qwen2's layers as a Qwen2Model does, or warns that it cannot.

    A model with a Qwen2Model inside is left alone: that one is judged by itself.
    """
    inside = any(isinstance(module, STOCK.Qwen2Model) for module in model.modules())
    if inside or _fixes_itself(type(model)) or not any(True for _ in base_models(model, STOCK)):
        return
    try:
        fix_built(model)
    except Qwen2FP16FixError as error:
        _warn(model, str(error))


def _judge(model: Any) -> None:
    """Fixes a Qwen2Model that has been built. If a subclass has changed its parts, warns instead.

    Raises PatchConflictError if the model is of transformers' own class and another tool has replaced its parts.
    """
    if _fixes_itself(type(model)):
        return
    try:
        fix_built(model)
    except PatchConflictError as error:
        if type(model) is STOCK.Qwen2Model:
            raise
        _warn(model, str(error))


def _judge_checkpoints_own(model: Any) -> None:
    """Fixes a model of a checkpoint's own code that has a Qwen2Config but no Qwen2Model, or warns that it cannot."""
    inside = any(isinstance(module, STOCK.Qwen2Model) for module in model.modules())
    if inside or not isinstance(getattr(model, "config", None), STOCK.Qwen2Config):
        return
    if not any(True for _ in base_models(model, STOCK)):
        _warn(model, "it is made of parts of its own.")
        return
    try:
        fix_built(model)
    except Qwen2FP16FixError as error:
        _warn(model, str(error))


def _warn(model: Any, reason: str) -> None:
    if is_switched_off() or stock_is_wanted():
        return
    kind = type(model)
    warnings.warn(
        f"{kind.__module__}.{kind.__qualname__} is a Qwen2 with code of its own and is NOT fixed, so it may overflow "
        f"in float16: {reason} Run it in bfloat16 or float32.",
        NotFixedWarning,
        stacklevel=2,
    )
