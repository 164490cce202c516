"""The code of transformers that a Qwen2 runs, and digests of it by class, by function and by file."""

import base64
import importlib.metadata
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers

from .loaded_code import as_text, source_of
from .source_files import ENDINGS, sha256

NAME = "transformers."
FOLDER = Path(str(transformers.__file__)).parent


def entered_modules() -> dict[str, types.ModuleType]:
    """The modules of transformers that a forward or `generate` of its Qwen2 can enter, by name.

    These are the modules whose classes, functions, tables and submodules its Qwen2 module names, the modules that
    those name, and the modules of the decorators on all of these. A test holds them against a trace.
    """
    try:
        from transformers.models.qwen2 import modeling_qwen2 as stock
    except ImportError:  # a release before Qwen2
        return {}
    near = {stock.__name__, *_named_modules(stock)}
    far = {name for module in near for name in _named_modules(sys.modules[module])}
    around = {name for module in near | far for name in _decorating_modules(sys.modules[module])}
    modules = {name: sys.modules[name] for name in sorted(near | far | around)}
    return {name: module for name, module in modules.items() if getattr(module, "__file__", None)}


def _named_modules(module: types.ModuleType) -> set[str]:
    """Names of the modules of transformers from which anything in this module comes."""
    found = {
        str(getattr(origin, "__name__" if isinstance(origin, types.ModuleType) else "__module__", ""))
        for thing in [*vars(module).values(), *(entry for _, entry in _entries(module))]
        for origin in (thing, type(thing), *(thing.__mro__ if isinstance(thing, type) else ()))
    }
    return {name for name in found if name.startswith(NAME) and name in sys.modules}


def _decorating_modules(module: types.ModuleType) -> set[str]:
    """Names of the modules of transformers whose functions wrap those of this module or its classes."""
    named = list(vars(module).values())  # another thread may import meanwhile
    own = [kind for kind in named if isinstance(kind, type) and kind.__module__ == module.__name__]
    things = [*named, *(thing for kind in own for thing in list(vars(kind).values()))]
    wrappers = [thing for thing in things if isinstance(thing, types.FunctionType) and hasattr(thing, "__wrapped__")]
    found = {str(wrapper.__globals__.get("__name__")) for wrapper in wrappers}
    return {name for name in found if name.startswith(NAME) and name in sys.modules}


def _entries(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """What the tables of this module hold that is a class or a function, named as `TABLE[key]`.

    Tables are dicts and other mappings: attention implementations, RoPE variants, activations, kinds of caches.
    """
    for name, table in list(vars(module).items()):
        if name.startswith("__") or isinstance(table, type) or not isinstance(table, Mapping):
            continue
        # A dict of transformers may build what it is asked for; its entries are read without asking.
        for key, entry in dict.items(table) if isinstance(table, dict) else table.items():
            thing = entry[0] if isinstance(entry, tuple) and entry else entry
            if isinstance(key, str) and isinstance(thing, (type, types.FunctionType)):
                yield f"{name}[{key}]", thing


def file_of(module: types.ModuleType) -> str:
    """The path of a module's file inside transformers, or all of it for a file that lies elsewhere."""
    path = Path(str(module.__file__))
    return (path.relative_to(FOLDER) if path.is_relative_to(FOLDER) else path).as_posix()


def upstream_digests(modules: Mapping[str, types.ModuleType]) -> dict[str, str]:
    """A digest of each class and function of transformers that its Qwen2 module defines, imports or has in a table.

    modules: from `entered_modules`. The tables of those that Qwen2's module names count as well.
    The fix overrides fewer, but masks, caches and generation decide the numbers too.
    """
    stock = modules.get("transformers.models.qwen2.modeling_qwen2")
    if stock is None:
        return {}
    found = {
        name: source_digest(own) for name, thing in list(vars(stock).items()) if (own := stock_code(thing)) is not None
    }
    for module in sorted({stock.__name__, *_named_modules(stock)}):
        for name, entry in _entries(modules.get(module, stock)):
            own = stock_code(entry)
            found[name] = _name_digest(entry) if own is None else source_digest(own)
    return dict(sorted(found.items()))


def stock_code(thing: Any) -> Any:
    """A class or function of transformers, or the stock class of a drop-in class; None for anything else."""
    for candidate in getattr(thing, "__mro__", (thing,)):
        is_code = isinstance(candidate, (type, types.FunctionType))
        if is_code and str(candidate.__module__).startswith(NAME) and candidate.__name__ == thing.__name__:
            return candidate
    return None


def source_digest(thing: Any) -> str:
    """SHA-256 of the source of a class or function, or of its compiled code if the source is not installed."""
    source = source_of(thing.__module__)
    text = None if source is None else source.text(thing.__qualname__)
    return sha256(text) if text is not None else "code " + sha256(_compiled(thing).encode())


def _name_digest(thing: Any) -> str:
    """A digest of the origin of a class or function that is not transformers' own."""
    return sha256(f"{thing.__module__}.{thing.__qualname__}".encode())


def _compiled(thing: Any) -> str:
    """A class, function, code object or constant as text; the text is the same in each process of a Python version."""
    if isinstance(thing, type):
        return repr(
            [(name, _compiled(f)) for name, f in sorted(vars(thing).items()) if isinstance(f, types.FunctionType)]
        )
    if isinstance(thing, types.FunctionType):
        return _compiled(thing.__code__)
    if isinstance(thing, types.CodeType):
        return repr((thing.co_code, thing.co_names, thing.co_varnames, [_compiled(c) for c in thing.co_consts]))
    return as_text(thing)


def unlike_record(files: Mapping[str, str]) -> list[str]:
    """The files of transformers that are not as pip recorded them when it installed them; none without such a record.

    files: the digest of each file that is there.
    """
    try:
        entries = importlib.metadata.distribution("transformers").files or []
    except importlib.metadata.PackageNotFoundError:
        return []
    recorded = {
        "/".join(entry.parts[1:]): entry.hash.value
        for entry in entries
        if entry.parts[0] == FOLDER.name and entry.hash is not None and entry.name.endswith(ENDINGS)
    }
    if not recorded:
        return []
    there = {name: base64.urlsafe_b64encode(bytes.fromhex(digest)).decode() for name, digest in files.items()}
    return [name for name in sorted({*there, *recorded}) if there.get(name, "").rstrip("=") != recorded.get(name)]
