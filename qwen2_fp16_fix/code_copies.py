"""Finds the model that a caller means, and the copy of `patches/` that built it: this package's, or a checkpoint's own.

Each copy knows its own classes only. So questions about a model, and changes to it, go to the copy that built it.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from types import ModuleType
from typing import Any

from torch import nn

from .patches import errors, modeling_qwen2_fp16
from .patches.errors import NotQwen2Error

ENTRY = modeling_qwen2_fp16.__name__.rpartition(".")[2]


def model_in(given: Any, also: str = "") -> nn.Module:
    """A model as it is, or the model that something has as `model`: a pipeline, a Trainer, lm-eval's HFLM.

    also: what else the caller takes, as "a checkpoint folder, ".
    Raises NotQwen2Error for what is not a model and has none.
    """
    held = given if isinstance(given, nn.Module) else getattr(given, "model", None)
    if isinstance(held, nn.Module):
        return held
    if isinstance(given, str | PathLike):
        raise NotQwen2Error(
            f"found no Qwen2 in {str(given)!r}, the name of a checkpoint: load it with from_pretrained, and pass what "
            "that returns."
        )
    what = f"the class {given.__qualname__}" if isinstance(given, type) else f"this {type(given).__qualname__}"
    raise NotQwen2Error(
        f"found no Qwen2 in {what}: pass {also}a loaded model, or a pipeline or Trainer that has one as its `model`."
    )


def code_of(model: Any) -> ModuleType:
    """The entry file of the copy that fixed `model`; this package's, if no part is fixed yet.

    Of nested copies the innermost counts, since its parts do the computing.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    homes = [kind.__module__ for module in modules for kind in reversed(type(module).__mro__)]
    ours = [home for home in homes if home.rpartition(".")[2] == ENTRY and home in sys.modules]
    return sys.modules[ours[-1]] if ours else modeling_qwen2_fp16


def sibling(code: ModuleType, *names: str) -> ModuleType:
    """The module of the same copy as the entry file `code` that has the first of these names; later ones are older."""
    folder = code.__name__.removesuffix(ENTRY)
    return next(sys.modules[folder + name] for name in names if folder + name in sys.modules)


def stock_classes(code: Any) -> Any:
    """transformers' own Qwen2 classes by name, as an entry file knows them; exports of 0.1.1 call it ORIGINAL."""
    return code.STOCK if hasattr(code, "STOCK_OF") else code.ORIGINAL


def stock_of(code: Any) -> Mapping[type, type]:
    """Fixed class to stock class, of the parts that an entry file has made; exports of 0.1.1 call it STOCK."""
    table: Mapping[type, type] = code.STOCK_OF if hasattr(code, "STOCK_OF") else code.STOCK
    return table


def origin_of(code: ModuleType) -> str:
    """`package` or `remote`."""
    return "package" if code is modeling_qwen2_fp16 else "remote"


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a linear computes with its weights alone. Exports of 0.1.0 have a class of their own for it."""
    return type(module) is nn.Linear or type(module).__name__ == "ExactBiasLinear"


@contextmanager
def own_errors() -> Iterator[None]:
    """Turns an error of another copy into this package's error of the same name: callers cannot import the other."""
    try:
        yield
    except Exception as error:
        own = getattr(errors, type(error).__name__, None)
        if own is None or isinstance(error, own) or type(error).__module__.rpartition(".")[2] != "errors":
            raise
        raise own(str(error)) from error
