"""Checks that the installed Qwen2 source has the structure a range module was written for, before anything is patched.

The release number alone does not prove it, so this file looks at the code. It reads the parameters of functions
and the names that they use from their compiled code. So it works without source files and ignores comments, annotations
and decorators.
"""

import inspect
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from .errors import PatchConflictError, UnsupportedTransformersError, UntestedTransformersWarning
from .replaced import ADVICE, FUNCTIONS, HOMES, foreign_part, name_of
from .version_map import NEWEST_TESTED, SUPPORTED, is_untested


def check_structure(stock: Any, parts: Mapping[str, type], version: str) -> None:
    """Checks every stock class that a part in `parts` is made for.

    stock: transformers' Qwen2 classes, by name, as attributes. Each part names what it relies on: `stock_parameters`,
    the first parameters of stock's forward, and `stock_names`, names its forward or constructor must use.
    Raises PatchConflictError if another tool has replaced a class, its forward or a function that it calls, and
    UnsupportedTransformersError if the class is stock but has another structure.
    """
    _check_functions(sys.modules[stock.__name__])
    for name in ("Qwen2Model", "Qwen2ForCausalLM"):  # the fix leaves their forwards alone, but they have to be stock's
        _check_origin(stock, name, getattr(stock, name))
    for name, part in parts.items():
        found = getattr(stock, name, None)
        if not isinstance(found, type):
            raise _unknown_shape(version, f"no class {name}", f"a class {name}")
        _check_origin(stock, name, found)
        parameters = tuple(inspect.signature(found.forward).parameters)[1:]  # type: ignore[attr-defined]
        wanted: tuple[str, ...] = part.stock_parameters  # type: ignore[attr-defined]
        if parameters[: len(wanted)] != wanted:
            raise _unknown_shape(version, f"{name}.forward({', '.join(parameters)})", f"({', '.join(wanted)}, ...)")
        missing = part.stock_names - _names_used(found.forward) - _names_used(found.__init__)  # type: ignore[attr-defined, misc]
        if missing:
            raise _unknown_shape(version, f"{name} without {', '.join(sorted(missing))}", "it to use them")


def _check_origin(stock: Any, name: str, found: type) -> None:
    """Raises PatchConflictError unless the class and its forward come from transformers."""
    by = found if not found.__module__.startswith(HOMES) else foreign_part(found.forward)  # type: ignore[attr-defined]
    if by is not None:
        raise _conflict(f"{stock.__name__}.{name}", by)


def _check_functions(module: Any) -> None:
    """Raises PatchConflictError if a function that a fixed attention does not call is not transformers' own."""
    for name in FUNCTIONS:
        by = foreign_part(getattr(module, name, None))
        if by is not None:
            raise _conflict(f"{module.__name__}.{name}", by)


def _conflict(name: str, by: Any) -> PatchConflictError:
    return PatchConflictError(f"{name} has been replaced by {name_of(by)}, which a fixed model does not run: {ADVICE}")


def _names_used(function: Any) -> set[str]:
    """Globals, attributes and locals that a function uses, without those of its decorators."""
    code = inspect.unwrap(function).__code__
    return {*code.co_names, *code.co_varnames, *code.co_freevars}


def _unknown_shape(version: str, found: str, expected: str) -> UnsupportedTransformersError:
    return UnsupportedTransformersError(
        f"the Qwen2 source of transformers {version} has an unknown structure: found {found}, expected {expected}; "
        f"{SUPPORTED} are supported: install one of them, or a newer qwen2-fp16-fix."
    )


def warn_if_untested(version: str) -> None:
    """Warns of a transformers that is newer than every tested one."""
    if is_untested(version):
        warnings.warn(
            f"transformers {version} is newer than {NEWEST_TESTED}, the newest release tested with this fix; its Qwen2 "
            "source has the expected structure, so the fix is applied, but untested.",
            UntestedTransformersWarning,
            stacklevel=3,
        )
