"""Whether the functions that run here are those in their source files. Only Python code can be compared so.

Each source is compiled again and compared with the code that the functions in memory run. So a function that was
replaced or wrapped after its import is found, and so is bytecode in `__pycache__` that was not made from the source
beside it.
"""

import functools
import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

#: Packages whose functions a decorator in a source may add.
LIBRARIES = frozenset({"torch", "huggingface_hub", *sys.stdlib_module_names})

UPSTREAM, PACKAGE = "transformers.", "qwen2_fp16_fix."
KNOWN = LIBRARIES | {"transformers", "qwen2_fp16_fix"}

#: Bits of a code object's flags: it has fast locals, so it is a function's and not a class's.
OPTIMISED = 1


class Source:
    """A source file, compiled: the code of each of its functions and classes, by its qualified name."""

    def __init__(self, content: bytes, path: str) -> None:
        """Raises SyntaxError or ValueError if it cannot be compiled."""
        self.lines = content.splitlines()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the source, told when it was imported
            self.module = compile(content, path, "exec", dont_inherit=True)
        self.codes: dict[str, list[types.CodeType]] = {}  # a list: a name may be defined in two branches
        for name, code in _inner_codes(self.module, ""):
            self.codes.setdefault(name, []).append(code)
        self.all = {code for codes in self.codes.values() for code in codes}

    def is_decorated(self, code: types.CodeType) -> bool:
        """Whether the function with this code has a decorator: its code begins there."""
        return self.lines[code.co_firstlineno - 1].lstrip().startswith(b"@")

    def text(self, name: str) -> bytes | None:
        """The lines of a function or class, with its decorators; None if it is not in this file."""
        found = [self._lines_of(code) for code in self.codes.get(name, ())]
        return b"\n".join(found) if found else None

    def _lines_of(self, code: types.CodeType) -> bytes:
        """From its first line to the last that is indented further, or that closes a bracket."""
        first = code.co_firstlineno - 1
        margin = _indentation(self.lines[first])
        heads = (b"def ", b"class ", b"async ")
        last = next(i for i in range(first, len(self.lines)) if self.lines[i].lstrip().startswith(heads))
        for number in range(last + 1, len(self.lines)):
            line = self.lines[number]
            if not line.strip() or line.lstrip().startswith(b"#"):
                continue
            if _indentation(line) <= margin and line.lstrip()[:1] not in b")]}":
                break
            last = number
        return b"\n".join(self.lines[first : last + 1])


def _indentation(line: bytes) -> int:
    return len(line) - len(line.lstrip())


def _inner_codes(code: types.CodeType, before: str) -> Iterator[tuple[str, types.CodeType]]:
    """Qualified name and code of everything that is defined inside. Python 3.10 does not store these names."""
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            name = before + inner.co_name
            yield name, inner
            yield from _inner_codes(inner, f"{name}.<locals>." if inner.co_flags & OPTIMISED else f"{name}.")


@functools.lru_cache(maxsize=2**10)  # compiling the same text again gives the same code
def compiled(content: bytes, path: str) -> Source:
    """The compiled source file. Raises SyntaxError or ValueError if it cannot be compiled."""
    return Source(content, path)


def source_of(module: str) -> Source | None:
    """The compiled source of an imported module; None without a source, as for C extensions."""
    path = getattr(sys.modules.get(module), "__file__", None) or ""
    try:
        return compiled(Path(path).read_bytes(), path) if path.endswith(".py") else None
    except (OSError, SyntaxError, ValueError):
        return None


def other_code(modules: Mapping[str, types.ModuleType]) -> dict[str, str]:
    """What runs other code than its source in these modules: the place, and whose code is there.

    modules: by name. The code of these modules may wrap each other's functions; so may ours those of transformers.
    """
    found: dict[str, str] = {}
    for name, module in modules.items():
        source = source_of(name)
        if source is None:
            continue
        if _bytecode_differs(module, source):
            found[name] = "bytecode that was not made from it; delete __pycache__"
        for place, whose in _other_functions(module, source, frozenset(modules)):
            found[f"{name}.{place}"] = whose
    return found


def _bytecode_differs(module: types.ModuleType, source: Source) -> bool:
    """Whether Python would import other bytecode than that of the source."""
    path = str(module.__file__)
    try:
        kept = importlib.util.cache_from_source(path)
    except NotImplementedError:  # a Python that keeps none
        return False
    state = _state(kept)
    return state is not None and not _keeps(path, source, _state(path), state)


def _state(path: str) -> tuple[int, ...] | None:
    """What the system says of a file, which differs once it has been written to; None for no file."""
    try:
        about = os.stat(path)
    except OSError:
        return None
    return (about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


@functools.lru_cache(maxsize=2**10)
def _keeps(path: str, source: Source, *states: tuple[int, ...] | None) -> bool:
    """Whether Python's own import takes the code of this source. states: of the source and of what is kept of it."""
    loader = importlib.machinery.SourceFileLoader("kept", path)
    try:
        kept = loader.get_code("kept")
    except (OSError, ImportError, SyntaxError, ValueError, EOFError, TypeError):
        return False
    return kept is not None and is_same(kept, source.module)


def _other_functions(module: types.ModuleType, source: Source, own: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Place and owner of each function in this module or its classes that runs other code than the source."""
    for name, codes in source.codes.items():
        if "<" in name:  # inside a function
            continue
        outer, _, last = name.rpartition(".")
        is_function = bool(codes[0].co_flags & OPTIMISED)
        holder = _defined(module, outer if is_function else name)
        if holder is None:  # defined under a condition that does not hold here
            continue
        if isinstance(holder, type) and not _is_at_home(holder, module.__name__):
            yield outer if is_function else name, f"{holder.__qualname__} of {holder.__module__}"
        elif is_function:
            there = vars(holder).get(last, vars(holder).get(_private(outer, last)))
            yield from ((name, whose) for each in _functions_in(there) if (whose := _whose(each, source, codes, own)))
        else:
            yield from ((f"{name}.{added}", whose) for added, whose in _added(holder, name, source, own))


def _defined(module: types.ModuleType, name: str) -> Any:
    """What a module holds under a qualified name, or the module itself for an empty name; None if it holds nothing."""
    found: Any = module
    for step in filter(None, name.split(".")):
        found = getattr(found, "__dict__", {}).get(step)
    return _stock_class(found, module.__name__)


def _is_at_home(kind: type, module: str) -> bool:
    """Whether a class is of the module it is found in. Our drop-in classes say that they are stock's."""
    return kind.__module__ == module or (kind.__module__.startswith(UPSTREAM) > module.startswith(UPSTREAM))


def _private(outer: str, name: str) -> str:
    """The name that Python gives in a class to what is written with two underscores before it."""
    return f"_{outer.rpartition('.')[2].lstrip('_')}{name}" if name.startswith("__") else name


def _added(kind: Any, name: str, source: Source, own: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Name and owner of each function of a class that its source does not define and another tool has added."""
    holder_name = name.rpartition(".")[2]
    for attribute, thing in list(getattr(kind, "__dict__", {}).items()):
        for function in _functions_in(thing) if f"{name}.{attribute}" not in source.codes else ():
            module = _module_of(function)
            is_ours = _is_known(module, own) or module == f"namedtuple_{holder_name}"
            if isinstance(function, types.FunctionType) and not is_ours:
                yield attribute, f"{_name_of(function)} of {module}"


def _is_known(module: str, own: frozenset[str]) -> bool:
    """Whether a module is of transformers, of ours, or of what a decorator may bring along."""
    return module.partition(".")[0] in KNOWN or module in own


def _stock_class(holder: Any, module: str) -> Any:
    """For a drop-in class, which `qwen2-fp16-fix run` puts under stock's name: the class that it stands in for."""
    bases = [base for base in getattr(holder, "__mro__", ()) if base.__module__ == module]
    return next((base for base in bases if base.__name__ == holder.__name__), holder)


def _functions_in(thing: Any) -> list[Any]:
    """The functions that an attribute of a class or a module calls."""
    if isinstance(thing, property):
        return [each for each in (thing.fget, thing.fset, thing.fdel) if each is not None]
    if isinstance(thing, functools.cached_property):
        return [thing.func]
    if isinstance(thing, (classmethod, staticmethod)):
        return [thing.__func__]
    return [] if thing is None else [thing]


def _whose(function: Any, source: Source, codes: list[types.CodeType], own: frozenset[str]) -> str:
    """Whose code runs before or instead of the source's; "" if only code runs that the source asks for."""
    chain = [function]
    while (inner := getattr(chain[-1], "__dict__", {}).get("__wrapped__")) is not None and len(chain) < 100:
        chain.append(inner)
    at = next((i for i, link in enumerate(chain) if _runs(link, codes)), None)
    decorated = any(source.is_decorated(code) for code in codes)
    for link in chain[:at]:
        if not _is_expected(link, decorated, own):
            return f"{_name_of(link)} of {_module_of(link)}"
    return f"{_name_of(function)} of {_module_of(function)}" if at is None else ""


def _runs(function: Any, codes: list[types.CodeType]) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and any(is_same(code, each) for each in codes)


def _is_expected(link: Any, decorated: bool, own: frozenset[str]) -> bool:
    """Whether a wrapper is one of transformers or of ours as they are in their source, or a decorator's."""
    module = _module_of(link)
    if isinstance(link, functools._lru_cache_wrapper):
        return decorated
    if module in own or module.startswith((UPSTREAM, PACKAGE)):
        source = source_of(module)
        if source is None:
            return False
        return getattr(link, "__code__", None) in source.all or _runs(link, list(source.all))
    return decorated and module.partition(".")[0] in LIBRARIES and not module.startswith("torch._dynamo")


def _module_of(function: Any) -> str:
    """Where a function was really defined: functools.wraps copies the name, not the globals."""
    return str(getattr(function, "__globals__", {}).get("__name__") or type(function).__module__)


def _name_of(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return type(function).__qualname__ if code is None else code.co_name  # Python 3.10 has no longer name of a code


def is_same(one: types.CodeType, other: types.CodeType) -> bool:
    """Whether two code objects do the same. Python's own comparison may see notes that were made while code ran."""
    return one == other or _content(one) == _content(other)


def _content(code: types.CodeType) -> tuple[Any, ...]:
    constants = tuple(_content(c) if isinstance(c, types.CodeType) else as_text(c) for c in code.co_consts)
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return (code.co_code, counts, names, constants)


def as_text(constant: Any) -> str:
    """A constant as text, the same in every process: the order of a set is not."""
    return repr(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)
