"""Notices code of transformers' Qwen2 that another tool has replaced, and that fixed models do not run.

Attribution tools and kernels put functions of their own on transformers' classes, or into its module. In 16 bit a fixed
model computes with its own norm, MLP, rotation and eager attention, so such a tool has no effect on it, or only a
part.
"""

import operator
import types
import warnings
from typing import Any

import torch
from torch import Tensor

from .autocast import is_full_precision
from .errors import PatchConflictWarning

#: Functions of transformers' module that a fixed attention has its own code for. eager_attention_forward is there from
#: 4.48 on.
FUNCTIONS = ("apply_rotary_pos_emb", "eager_attention_forward", "repeat_kv", "rotate_half")
FORWARD = operator.attrgetter("forward")
#: Where stock's code, and what it may be decorated with, is defined.
HOMES = ("transformers.", "torch.", "kernels.")
#: How the sentence about a tool ends. It does not help to fix the model first: then the tool would have no effect.
ADVICE = (
    "switch that tool off for Qwen2, or use it without the fix, in float32 or bfloat16 and on a model that was built "
    "inside `with qwen2_fp16_fix.stock_models():`."
)


class Watched:
    """The code that fixed models do not run, as it was when this copy of the fix was imported and as it is."""

    def __init__(self) -> None:
        """Watches nothing until `begin`."""
        self.module: Any = None
        self.kinds: tuple[Any, ...] = ()
        self.first: dict[str, Any] = {}  # the functions at import
        self.seen: list[Any] = []  # what the last forward found

    def begin(self, module: Any, kinds: tuple[type, ...]) -> None:
        """module: transformers' Qwen2 module; kinds: the stock classes that have a fixed class."""
        self.module, self.kinds = module, kinds
        self.first = {name: getattr(module, name, None) for name in FUNCTIONS}
        self.seen = self.now()

    def now(self) -> list[Any]:
        """The forwards and functions as they are."""
        return [*map(FORWARD, self.kinds), *map(vars(self.module).get, FUNCTIONS)]

    def foreign(self) -> list[str]:
        """A text for each that is not transformers' own."""
        forwards = {f"{kind.__name__}.forward": kind.forward for kind in self.kinds}
        functions = {name: getattr(self.module, name, None) for name in FUNCTIONS}
        places = {name: foreign_part(code) for name, code in {**forwards, **functions}.items()}
        return [f"{name} ({name_of(code)})" for name, code in places.items() if code is not None]


WATCHED = Watched()


def foreign_part(code: Any) -> Any:
    """What in a function is not of transformers: the function, or one that it wraps; None if all of it is."""
    while isinstance(code, types.FunctionType):
        if not str(code.__globals__.get("__name__")).startswith(HOMES):
            return code
        code = getattr(code, "__wrapped__", None)
    home = getattr(code, "__module__", None) or "transformers."
    return None if home.startswith(HOMES) else code


def home_of(code: Any) -> str:
    """The module of a function or a class. A wrapper takes over that of what it wraps, but not its globals."""
    home = str(getattr(code, "__module__", None))
    return str(getattr(code, "__globals__", {}).get("__name__", home)) if home.startswith(HOMES) else home


def name_of(code: Any) -> str:
    """Module and name of a function or a class. In its code a wrapper has a name of its own."""
    name = getattr(getattr(code, "__code__", None), "co_qualname", None) or getattr(code, "__qualname__", None)
    return f"{home_of(code)}.{name or type(code).__qualname__}"


def notice_replaced(normed: Tensor) -> None:
    """At the end of a forward: warns if code that it has not run was replaced since the last one.

    normed: the last hidden state. In float32 a fixed model runs stock's code, and so the other tool's.
    """
    if torch.compiler.is_compiling() or WATCHED.now() == WATCHED.seen or is_full_precision(normed):
        return
    WATCHED.seen = WATCHED.now()
    found = WATCHED.foreign()
    if found:
        warnings.warn(
            f"after this model was fixed, a tool replaced {', '.join(found)}, which a fixed model does not run: "
            f"{ADVICE}",
            PatchConflictWarning,
            stacklevel=2,
        )
