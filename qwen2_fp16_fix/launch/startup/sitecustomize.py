"""Python runs this at the start of every process beneath `qwen2-fp16-fix run`, and it registers the fix there.

It waits until the program imports transformers, so that processes which never do pay nothing. Where the fix cannot be
had, the process ends with one sentence and exit code 3 rather than going on with a stock Qwen2.
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
    """Lets `transformers` be found as always, and registers the fix once its package has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec only for `transformers`, and only the first time."""
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
    """Registers the fix in this process, or ends it with the reason."""
    try:
        if (CHECKOUT / "pyproject.toml").is_file() and str(CHECKOUT) not in sys.path:
            sys.path.append(str(CHECKOUT))  # run from a checkout that is not installed
        from qwen2_fp16_fix.registration.register import register

        register()
    except ImportError as error:
        end(f"cannot import the fix ({error}): run `{sys.executable} -m pip install qwen2-fp16-fix`.")
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "qwen2_fp16_fix":
            raise
        end(str(error))


def end(sentence: str) -> NoReturn:
    """Ends the process: SystemExit passes through programs that catch every Exception."""
    print(f"qwen2-fp16-fix: {sentence}", file=sys.stderr)
    raise SystemExit(3)


def run_shadowed_sitecustomize() -> None:
    """Runs the sitecustomize that this one hides, if the environment has another."""
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, AfterTransformers())
run_shadowed_sitecustomize()
