"""Registers the fix in a process under `qwen2-fp16-fix run`. Python runs this file at the start of each of them.

It waits until the program imports transformers, so that other programs lose no time. If the fix cannot be registered,
the process ends with one sentence and exit code 3: it must not continue with a stock Qwen2.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[2]


class AfterTransformers(importlib.abc.MetaPathFinder):
    """Finds `transformers` as usual, and registers the fix once its package has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of `transformers`, the first time only; None for everything else."""
        if fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                register_or_exit()

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def register_or_exit() -> None:
    """Registers the fix, or ends the process with the reason."""
    try:
        if (CHECKOUT / "pyproject.toml").is_file() and str(CHECKOUT) not in sys.path:
            sys.path.append(str(CHECKOUT))  # for a checkout that is not installed
        import qwen2_fp16_fix
    except ImportError as error:
        end(f"cannot import the fix ({error}): run `{sys.executable} -m pip install qwen2-fp16-fix`.")
    try:
        qwen2_fp16_fix.register()
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "qwen2_fp16_fix":
            raise
        end(str(error))


def end(sentence: str) -> NoReturn:
    """Ends the process. SystemExit is not caught by programs that catch every Exception."""
    print(f"qwen2-fp16-fix: {sentence}", file=sys.stderr)
    raise SystemExit(3)


def run_shadowed_sitecustomize() -> None:
    """Runs the sitecustomize that this one hides, if there is another on the path."""
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, AfterTransformers())
run_shadowed_sitecustomize()
