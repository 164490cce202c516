"""Turns stock Qwen2 modules into fixed ones in place, and back, by exchanging their classes: all of them or none.

No weight moves and no forward is assigned. A module keeps its parameters, buffers, hooks and name. Its class becomes a
subclass of the stock one. So state dicts, gradient checkpointing, recorded outputs and isinstance work as before.
"""

import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import nn

from .architecture import QWEN2, Architecture
from .errors import MetaTensorError, NotQwen2Error, PatchConflictError
from .replaced import ADVICE

#: The name of `on_unfixed` up to 0.1.1. Code exported then looks for it on our parts, and has it on its own.
NAME_BEFORE = "release"


UNLOADED = (
    "{} is on the meta device and has no values: load the weights first (from_pretrained, or load_state_dict with "
    "assign=True)."
)


def exchange_all(
    root: nn.Module,
    stock: Any,
    classes: Mapping[type, type],
    built_here: bool = False,
    then: Callable[[nn.Module], None] = lambda root: None,
) -> None:
    """Gives every module in `root` whose class is a key of `classes` the class it maps to.

    stock: the stock classes, by name, as attributes. built_here: `root` is being constructed, so its weights may
    still be on the meta device. then: called with `root` after the exchange. If it raises, the exchange is undone.
    Everything is checked before the first module changes. Raises NotQwen2Error, PatchConflictError, MetaTensorError, or
    the error that `then` raises; `root` is then as it was.
    """
    check_model(root, stock, {*classes, *classes.values()})
    check_exchangeable(root, classes)
    if not built_here:
        check_weights(root)
    done: list[tuple[nn.Module, type]] = []
    try:
        for module in root.modules():
            before = known_class(module, classes)
            if before is not None:
                done.append((module, before))
                exchange(module, classes[before])
        then(root)
    except BaseException:
        for module, before in reversed(done):
            exchange(module, before)
        raise


def check_model(root: Any, stock: Any, known: set[type]) -> None:
    """Checks that `root` holds a Qwen2 and that each part of it is stock or already fixed.

    stock: the stock classes, by name, as attributes. known: every stock and every fixed class.
    Raises NotQwen2Error or PatchConflictError.
    """
    bases = list(base_models(root, stock)) if isinstance(root, nn.Module) else []
    if not bases:
        raise NotQwen2Error(
            f"found no Qwen2 in this {type(root).__module__}.{type(root).__qualname__}: pass a Qwen2 model of "
            "transformers, or a module that contains one."
        )
    for base in bases:
        for name, module, expected in parts_of(base, stock):
            _check_part(name, module, expected, known)


def check_weights(root: nn.Module) -> None:
    """Raises MetaTensorError if a weight is on the meta device and accelerate will not load it."""
    for name, parameter in root.named_parameters():
        if parameter.device.type == "meta" and not _is_offloaded(root, name):
            raise MetaTensorError(UNLOADED.format(name))


def base_models(root: nn.Module, stock: Any) -> Iterator[nn.Module]:
    """Every Qwen2Model inside `root`, `root` included, however it is wrapped.

    A module of another class counts if it holds Qwen2's own layers and final norm.
    """
    base = getattr(stock, QWEN2.base)
    return (module for module in root.modules() if isinstance(module, base) or _holds_stock_layers(module, stock))


def _holds_stock_layers(module: nn.Module, stock: Any) -> bool:
    """Whether a module holds Qwen2's own layers and norm under the names that they have in a Qwen2Model."""
    layers, norm = module._modules.get("layers"), module._modules.get(QWEN2.final_norm())
    if not isinstance(layers, nn.ModuleList) or not isinstance(norm, getattr(stock, QWEN2.stock_name("norm"))):
        return False
    layer_class = getattr(stock, QWEN2.stock_name("layer"))
    return len(layers) > 0 and all(isinstance(layer, layer_class) for layer in layers)


def layers_of(base: Any) -> Iterator[Any]:
    """The layers of a Qwen2Model, each taken out of its wrappers: FSDP, checkpointing, a compiler."""
    for layer in base.layers:
        while len(layer._modules) == 1:
            (layer,) = layer._modules.values()  # a wrapper holds the layer and nothing else
        yield layer


def known_class(module: nn.Module, known: Collection[type]) -> type | None:
    """The class of a module if it is `known`; of a class derived from a known one at runtime, that known one.

    fully_shard derives such classes. None for a derived class with a forward of its own.
    """
    found = type(module)
    if found in known:
        return found
    base: Any = next((kind for kind in found.__mro__ if kind in known), None)
    return base if base is not None and _runs(found.forward, base.forward) else None


def _runs(forward: Any, expected: Any) -> bool:
    """Whether a forward is the expected one, or wraps it, as in each class derived from a layer from 5.23 on."""
    while forward is not expected:
        inner = getattr(forward, "__wrapped__", None)
        if inner is None or forward.__code__ is not expected.__code__:
            return False
        forward = inner
    return True


def check_exchangeable(root: nn.Module, classes: Collection[type]) -> None:
    """Raises PatchConflictError for a class derived from one of `classes` at runtime, which its tool relies on."""
    for name, module in root.named_modules():
        known, found = known_class(module, classes), type(module)
        if known is not None and found is not known:
            raise PatchConflictError(
                f"{name} is a {found.__module__}.{found.__qualname__}, derived from transformers' {known.__name__}: "
                "fix or unfix the model before it is wrapped (fully_shard), or load it after register()."
            )


def parts_of(base: nn.Module, stock: Any, row: Architecture = QWEN2) -> Iterator[tuple[str, Any, type]]:
    """Name, module and stock class of each part of a base model that `row` lists; a missing module is None.

    stock: the stock classes, by name, as attributes. An optional part that is missing is left out.
    """
    places = [("", base, [(part.path, part) for part in row.parts if part.below_layer is None])]
    in_layer = [(part.below_layer, part) for part in row.parts if part.below_layer is not None]
    places += [(f"layers.{index}", layer, in_layer) for index, layer in enumerate(layers_of(base))]
    for prefix, root, parts in places:
        for path, part in parts:
            if not part.optional or module_at(root, path, missing=part) is not part:
                name = ".".join(filter(None, (prefix, path)))
                yield name, module_at(root, path), getattr(stock, part.stock)


def module_at(root: Any, path: str, missing: Any = None) -> Any:
    """The module at a path below `root`, or `root` itself for ""; `missing` where there is no such attribute."""
    for name in filter(None, path.split(".")):
        root = getattr(root, name, missing)
        if root is missing:
            break
    return root


def _check_part(name: str, module: Any, expected: type, known: set[type]) -> None:
    """Raises PatchConflictError unless the part is a stock module that no tool has changed, or a fixed one."""
    found = type(module)
    if known_class(module, {*known, expected}) is None or not issubclass(found, expected):
        raise PatchConflictError(
            f"{name} is a {found.__module__}.{found.__qualname__}, not transformers' {expected.__name__}: another tool "
            f"has replaced it; {ADVICE}"
        )
    override = module.__dict__.get("forward")
    if override is not None and not _kept_forwards(module):
        raise PatchConflictError(
            f"{name} has a forward of its own, {getattr(override, '__qualname__', override)!r}, set by another tool; "
            f"{ADVICE}"
        )


def _kept_forwards(module: nn.Module) -> list[str]:
    """The attributes of a module that hold the forward of its own class.

    accelerate keeps one under its hook. transformers 4.54 to 5.1 leave one after they have recorded outputs.
    """
    own = type(module).forward
    return [name for name in ("forward", "_old_forward") if getattr(module.__dict__.get(name), "__func__", None) is own]


def _is_offloaded(root: nn.Module, parameter: str) -> bool:
    """Whether accelerate loads this parameter when its module is called."""
    module = root.get_submodule(parameter.rpartition(".")[0])
    return hasattr(module, "_hf_hook")


def exchange(module: nn.Module, new: type) -> None:
    """Sets the class of one module: `on_unfixed` of the old class, then `on_fixed` of the new one.

    The old class may be another copy's, whose method has the name that releases up to 0.1.1 gave it.
    A forward of the old class that accelerate or transformers has stored on the module is replaced by the new one's.
    """
    kept = _kept_forwards(module)
    old = type(module)
    for name in ("on_unfixed", NAME_BEFORE):
        if hasattr(old, name):
            getattr(module, name)()
            break
    module.__class__ = new
    if hasattr(new, "on_fixed"):
        module.on_fixed(old)  # type: ignore[operator]
    for name in kept:
        module.__dict__[name] = types.MethodType(new.forward, module)  # type: ignore[attr-defined]
