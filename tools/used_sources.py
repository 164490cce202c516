"""Which files of this repository some of its Python files use, by their import statements. Nothing is imported for it.

The package finds its public names at their first use: what `qwen2_fp16_fix.NAME` uses is read from the statements that
tell type checkers where NAME is. Code inside a string counts, as programs that a test starts have it.
"""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = "qwen2_fp16_fix"


def used_by(files: Iterable[Path], root: Path) -> set[Path]:
    """`files` and all that they use under `root`, however indirectly: modules, their packages, data beside them.

    What is used of patches/ is given as files of `root / "patches"`.
    """
    public = _public_names(root)
    found: set[Path] = set()
    left = list(files)
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        if path.suffix == ".py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for name in _names_used(tree, _package_of(path, root), public):
                left += _files_of(name, root, path.parent)
            left += _data_beside(tree, path, root)
    return found


def _public_names(root: Path) -> dict[str, str]:
    """The module of each name that the package finds at its first use."""
    tree = ast.parse((root / PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if _is_for_checkers(node)]
    return {
        alias.name: f"{PACKAGE}.{node.module}"
        for block in blocks
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def _is_for_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _package_of(path: Path, root: Path) -> list[str]:
    return list(path.relative_to(root).parent.parts)


def _walk(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run, those of code in strings included."""
    for node in ast.iter_child_nodes(tree):
        if _is_for_checkers(node):
            continue
        yield node
        yield from _walk(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
            try:
                inner = ast.parse(node.value)
            except SyntaxError:
                continue  # a sentence
            yield from _walk(inner)


def _names_used(tree: ast.AST, package: list[str], public: dict[str, str]) -> Iterator[str]:
    """Dotted names that may be modules."""
    for node in _walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
            if module == PACKAGE:
                yield from (public[alias.name] for alias in node.names if alias.name in public)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == PACKAGE:
            yield from filter(None, [public.get(node.attr)])


def _files_of(name: str, root: Path, neighbours: Path) -> Iterator[Path]:
    """The module of this name and the packages it lies in; nothing if it is not of this repository."""
    if name.startswith(f"{PACKAGE}.patches"):
        name = name.removeprefix(f"{PACKAGE}.")  # one folder by two ways
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:end])
        yield from (path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file())
    yield from (path for path in [neighbours / f"{name}.py"] if path.is_file())


def _data_beside(tree: ast.AST, path: Path, root: Path) -> Iterator[Path]:
    """Files that a module of the package names and that lie beside it, or in a plain folder that it names."""
    if not path.is_relative_to(root / PACKAGE):
        return
    for node in _walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.replace(".", "").isidentifier()
        ):
            place = path.parent / node.value
            if place.is_file():
                yield place
            elif place.is_dir() and not (place / "__init__.py").exists():
                yield from (each for each in place.rglob("*") if each.is_file() and "__pycache__" not in each.parts)
