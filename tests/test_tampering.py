"""A lock sees every change of the code that decides the numbers, wherever it is made, and says where."""

import functools
import importlib.metadata
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import activations, cache_utils, masking_utils, modeling_rope_utils
from transformers.generation import utils as generation
from transformers.integrations import sdpa_attention
from transformers.models.qwen2 import modeling_qwen2 as stock

import qwen2_fp16_fix as q
from qwen2_fp16_fix import registration
from qwen2_fp16_fix.patches import key_centring, loaded_code, lock, lock_file, numerics, upstream_code
from qwen2_fp16_fix.patches.modeling_qwen2_fp16 import DROP_IN_OF

PACKAGE = Path(q.__file__).parent
Change = Callable[[], None]


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lock of what runs here."""
    return q.lock(tmp_path_factory.mktemp("lock") / "lock.json")


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed transformers by links, so that a link can be replaced by another file."""
    whole = tmp_path_factory.mktemp("upstream") / "transformers"
    shutil.copytree(
        upstream_code.FOLDER,
        whole,
        ignore=shutil.ignore_patterns("__pycache__"),
        copy_function=lambda source, target: Path(target).symlink_to(source),
    )
    return whole


@pytest.fixture
def edited(upstream: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same, as the folder that the lock reads; what a test has added or replaced is put back."""
    monkeypatch.setattr(lock, "FOLDER", upstream)
    yield upstream
    for path in upstream.rglob("*"):
        if path.is_file() and not path.is_symlink():
            original = upstream_code.FOLDER / path.relative_to(upstream)
            path.unlink()
            if original.is_file():
                path.symlink_to(original)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's code, as the one that is installed."""
    copy = tmp_path / "site" / "qwen2_fp16_fix"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "demo_checkpoint"))
    monkeypatch.setattr(lock, "HERE", copy / "patches")
    return copy


def append(path: Path) -> None:
    """A line of code at the end of a file; a link becomes a file of its own."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content + b"\nimport os\n")


def test_nothing_differs_where_nothing_was_changed(locked: Path, edited: Path, package: Path) -> None:
    """Of a wheel, a checkout and a copy with Windows' line ends alike, whatever Python keeps as bytecode."""
    for path in [*package.rglob("*.py"), edited / "cache_utils.py"]:
        content = path.read_bytes().replace(b"\n", b"\r\n")
        path.unlink()
        path.write_bytes(content)
    (package / "cli" / "__pycache__").mkdir()
    (package / "cli" / "__pycache__" / "main.cpython-311.pyc").write_bytes(b"bytecode")
    (package / "notes.txt").write_text("no code")
    (package / "again").symlink_to(package)  # a circle, as some checkouts have
    assert q.check(locked).differences == []


def test_code_appended_to_a_file_of_transformers_is_named(locked: Path, edited: Path) -> None:
    """Any of those that a forward can enter: the lock looked at classes, not at the files."""
    names = lock_file.read_lock(locked)["upstream_files"]
    assert {"models/qwen2/modeling_qwen2.py", "cache_utils.py", "masking_utils.py", "modeling_rope_utils.py"} < {*names}
    assert {"activations.py", "integrations/sdpa_attention.py", "generation/utils.py"} < {*names}
    for name in names:
        append(edited / name)
    assert q.check(locked).differences == [f"{name} of transformers is not the file that was locked." for name in names]


ANYWHERE: dict[str, tuple[str, str]] = {
    "a file that no forward enters": (
        "models/llama/modeling_llama.py",
        "Other files of transformers have changed since they were installed: models/llama/modeling_llama.py.",
    ),
    "a new file": ("fast.py", "Other files of transformers have changed since they were installed: fast.py."),
    "an extension beside a source": (
        "cache_utils.abi3.so",
        "cache_utils.abi3.so of transformers is not in the lock.",
    ),
    "bytecode in place of a source": ("masking_utils.pyc", "masking_utils.pyc of transformers is not in the lock."),
    "a folder in place of a source": (
        "activations/__init__.py",
        "activations/__init__.py of transformers is not in the lock.",
    ),
}


@pytest.mark.parametrize("change", ANYWHERE)
def test_a_change_elsewhere_in_transformers_is_named(change: str, locked: Path, edited: Path) -> None:
    name, sentence = ANYWHERE[change]
    path = edited / name
    if path.exists():
        append(path)
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert q.check(locked).differences == [sentence]


def test_without_a_record_of_pip_a_change_is_noticed(
    locked: Path, edited: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where transformers runs from a checkout."""

    def none(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    append(edited / "models" / "llama" / "modeling_llama.py")
    monkeypatch.setattr(importlib.metadata, "distribution", none)
    (said,) = q.check(locked).differences
    assert said == "A file of transformers is not the one that was locked, and pip's record does not say which."


def test_a_change_anywhere_in_the_package_is_named(locked: Path, package: Path, tmp_path: Path) -> None:
    """Outside patches/ as well. `register` and the environment refuse the same."""
    append(package / "registration" / "register.py")
    append(package / "patches" / "numerics.py")
    (package / "cli" / "extra.py").touch()
    (package / "locking.abi3.so").touch()  # would be imported in place of locking.py
    (package / "report" / "page.py").unlink()
    (package / "patches" / "extra.py").touch()
    (package / "patches" / "blocks").mkdir()
    (package / "patches" / "blocks" / "__init__.py").touch()
    found = q.check(locked).differences
    assert found == [
        "extra.py is not in the lock.",
        "numerics.py is not the file that was locked.",
        "qwen2_fp16_fix/cli/extra.py is not in the lock.",
        "qwen2_fp16_fix/locking.abi3.so is not in the lock.",
        "qwen2_fp16_fix/registration/register.py is not the file that was locked.",
        "qwen2_fp16_fix/report/page.py is locked but missing.",
        "blocks/__init__.py is not in the lock.",
    ]
    with pytest.raises(q.LockError) as caught:
        q.register(lock=locked)
    with pytest.raises(q.LockError) as asked:
        lock.check_lock(str(locked))  # where the environment names it
    assert str(asked.value) == str(caught.value)
    assert str(caught.value) == (
        f"this is not what {locked} locks: {' '.join(found[:3])} And 4 more: `qwen2-fp16-fix check {locked}` lists "
        "all. Install what is locked, or make a new lock."
    )
    assert not any(q.status().registered.values())


def test_a_package_in_a_zip_file_has_the_same_digests(package: Path, tmp_path: Path) -> None:
    """Python imports from one as well."""
    archive = Path(shutil.make_archive(str(tmp_path / "package"), "zip", package.parent))
    assert lock.code_digests(archive / "qwen2_fp16_fix") == lock.code_digests(package) != {}


def wrapped(function: Any) -> Any:
    """A wrapper that leaves no trace but its own code."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


MODULES = (stock, activations, cache_utils, generation, masking_utils, modeling_rope_utils, sdpa_attention)
MODULES += (key_centring, numerics)


def test_every_function_that_is_wrapped_at_run_time_is_named(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions, methods, class and static methods and properties: functools.wraps hid the wrapper from a lock."""
    places = set()
    for module in MODULES:
        source = loaded_code.source_of(module.__name__)
        assert source is not None
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == module.__name__ and "<" not in kind.__qualname__:
                for name, thing in list(vars(kind).items()):
                    if f"{kind.__qualname__}.{name}" in source.codes and (new := wrapped_attribute(thing)) is not None:
                        monkeypatch.setattr(kind, name, new)
                        places.add(f"{module.__name__}.{kind.__qualname__}.{name}")
        for name, thing in list(vars(module).items()):
            if isinstance(thing, types.FunctionType) and name in source.codes and thing.__module__ == module.__name__:
                monkeypatch.setattr(module, name, wrapped(thing))
                places.add(f"{module.__name__}.{name}")
    found = loaded_code.other_code({module.__name__: module for module in MODULES})
    monkeypatch.undo()
    assert {place for place, whose in found.items() if whose == f"wrapper of {__name__}"} == places
    assert len(places) > 300  # some 40 in each of these modules
    assert q.check(locked).passed


def wrapped_attribute(thing: Any) -> Any:
    """An attribute of a class, its function wrapped; None if it has none."""
    if isinstance(thing, (classmethod, staticmethod)):
        return type(thing)(wrapped(thing.__func__))
    if isinstance(thing, property):
        return property(wrapped(thing.fget), thing.fset, thing.fdel)
    return wrapped(thing) if isinstance(thing, types.FunctionType) else None


def other(*args: Any, **kwargs: Any) -> None:
    """What another tool puts in place of a function."""


class OtherLayer(cache_utils.DynamicLayer):  # type: ignore[misc]
    """What another tool puts in place of a class."""


HERE = f"of {__name__}"
QWEN2 = stock.__name__
RUN_TIME: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "another function": (
        lambda patch: patch.setattr(masking_utils, "create_causal_mask", other),
        f"transformers.masking_utils.create_causal_mask does not run the code in its source file, but other {HERE}.",
    ),
    "another class": (
        lambda patch: patch.setattr(cache_utils, "DynamicLayer", OtherLayer),
        f"transformers.cache_utils.DynamicLayer does not run the code in its source file, but OtherLayer {HERE}.",
    ),
    "a method that the source lacks": (
        lambda patch: patch.setattr(stock.Qwen2MLP, "__call__", other, raising=False),
        f"{QWEN2}.Qwen2MLP.__call__ does not run the code in its source file, but other {HERE}.",
    ),
    "other code in the same function": (
        lambda patch: patch.setattr(stock.Qwen2MLP.forward, "__code__", wrapped(other).__wrapped__.__code__),
        f"{QWEN2}.Qwen2MLP.forward does not run the code in its source file, but other of {QWEN2}.",
    ),
    "an object in place of a method": (
        lambda patch: patch.setattr(stock.Qwen2MLP, "forward", functools.partial(stock.Qwen2MLP.forward)),
        f"{QWEN2}.Qwen2MLP.forward does not run the code in its source file, but partial of functools.",
    ),
    "a compiled method": (
        lambda patch: patch.setattr(stock.Qwen2MLP, "forward", torch.compiler.disable(stock.Qwen2MLP.forward)),
        f"{QWEN2}.Qwen2MLP.forward does not run the code in its source file, but ",
    ),
    "a method under a decorator of torch's": (
        lambda patch: patch.setattr(stock.Qwen2MLP, "forward", torch.no_grad()(stock.Qwen2MLP.forward)),
        f"{QWEN2}.Qwen2MLP.forward does not run the code in its source file, but ",
    ),
    "an activation": (
        lambda patch: patch.setitem(activations.ACT2FN, "silu", torch.nn.GELU),
        "ACT2FN[silu] of transformers is not the code that was locked.",
    ),
    "a kind of cache": (
        lambda patch: patch.setitem(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "full_attention", OtherLayer),
        "DYNAMIC_LAYER_TYPE_MAPPING[full_attention] of transformers is not the code that was locked.",
    ),
    "an attention": (
        lambda patch: patch.setitem(stock.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", other),
        "ALL_ATTENTION_FUNCTIONS[sdpa] of transformers is not the code that was locked.",
    ),
    "a function of the fix": (
        lambda patch: patch.setattr(numerics, "rms_norm", other),
        f"qwen2_fp16_fix.patches.numerics.rms_norm does not run the code in its source file, but other {HERE}.",
    ),
    "a function of the package": (
        lambda patch: patch.setattr(sys.modules[f"{registration.__name__}.register"], "registered", other),
        f"qwen2_fp16_fix.registration.register.registered does not run the code in its source file, but other {HERE}.",
    ),
    "a drop-in class's method": (
        lambda patch: patch.setattr(DROP_IN_OF[stock.Qwen2ForCausalLM].__mro__[1], "__init__", other),
        "qwen2_fp16_fix.patches.modeling_qwen2_fp16.FixedOnConstruction.__init__ does not run the code in its source "
        f"file, but other {HERE}.",
    ),
}


@pytest.mark.parametrize("change", RUN_TIME)
def test_what_is_replaced_at_run_time_is_named(change: str, locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that compared sources found nothing."""
    replace, sentence = RUN_TIME[change]
    replace(monkeypatch)
    found = q.check(locked).differences
    monkeypatch.undo()
    assert any(said.startswith(sentence) for said in found), found
    assert len(found) == 1


def test_what_was_already_replaced_when_it_was_locked_is_no_drift(
    locked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tool that traces every call can be locked with."""
    monkeypatch.setattr(stock.Qwen2MLP, "forward", wrapped(stock.Qwen2MLP.forward))
    traced = q.lock(tmp_path / "lock.json")
    assert q.check(traced).passed
    monkeypatch.setattr(stock.Qwen2MLP, "forward", other)
    (said,) = q.check(traced).differences
    assert "Qwen2MLP.forward" in said
    monkeypatch.undo()
    assert q.check(traced).passed


def test_bytecode_that_was_not_made_from_its_source_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python runs what lies in __pycache__ if the size and the time of the source in it are right."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    source = tmp_path / "tampered.py"
    loader = importlib.machinery.SourceFileLoader("tampered", str(source))
    source.write_text("LIMIT = 1\n")
    assert loader.get_code("tampered") is not None  # writes the bytecode
    kept = Path(importlib.util.cache_from_source(str(source)))
    head, own = kept.read_bytes()[:16], kept.read_bytes()[16:]
    module = types.ModuleType("tampered")
    module.__file__ = str(source)
    monkeypatch.setitem(sys.modules, "tampered", module)
    assert loaded_code.other_code({"tampered": module}) == {}
    kept.write_bytes(head + own.replace(b"LIMIT", b"LIMID"))
    assert [*loaded_code.other_code({"tampered": module})] == ["tampered"]
    source.write_text("LIMIT = 22\n")  # of another size: Python does not use it
    assert loaded_code.other_code({"tampered": module}) == {}
