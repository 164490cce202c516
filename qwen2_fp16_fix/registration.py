"""Makes transformers' Auto classes build fixed Qwen2 models, and undoes it."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.models.auto import auto_factory, modeling_auto

from .patches.errors import RegistrationError
from .patches.modeling_qwen2_fp16 import MODELS, ORIGINAL, is_switched_off
from .pinning import refuse_drift

logger = logging.getLogger("qwen2_fp16_fix")

Qwen2Config: Any = ORIGINAL.Qwen2Config

_MISSING = object()
_before: dict[Any, Any] = {}  # Auto class to what its table held for Qwen2 before `register`, or _MISSING


def register(lock: str | Path | None = None) -> None:
    """From here on AutoModel, AutoModelForCausalLM and the Auto classes of every Qwen2 head build the fixed classes.

    lock: a file made by `qwen2_fp16_fix.lock`; LockError is raised where anything differs from it, LockFileError where
    it is none. Calling `register` again changes nothing. With QWEN2_FP16_FIX=0 in the environment it does nothing and
    logs a warning.
    Raises UnsupportedTransformersError or PatchConflictError where the installed transformers cannot be fixed, and
    RegistrationError where a look-up afterwards does not answer with the fixed class; then nothing is registered.
    """
    if lock is not None:
        refuse_drift(lock)
    if is_switched_off():
        logger.warning("QWEN2_FP16_FIX=0: the fix is switched off, Qwen2 models are built from the stock classes")
        return
    try:
        for auto in qwen2_auto_classes():
            _register_one(auto)
    except BaseException:
        unregister()
        raise


def unregister() -> None:
    """Puts the Auto classes back to what they built before `register`. Models already built stay as they are."""
    for auto, before in _before.items():
        table: Any = auto._model_mapping._extra_content
        table.pop(Qwen2Config, None)
        if before is not _MISSING:
            table[Qwen2Config] = before
    _before.clear()


@contextlib.contextmanager
def registered(lock: str | Path | None = None) -> Iterator[None]:
    """`register` for the length of a with block; a registration made before it outlives it.

    lock and errors: as of `register`, before the block begins.
    """
    was_registered = bool(_before)
    register(lock)
    try:
        yield
    finally:
        if not was_registered:
            unregister()


def qwen2_auto_classes() -> list[Any]:
    """The Auto classes that build a Qwen2 for which there is a fixed class, each once."""
    found: list[Any] = []
    for auto in vars(modeling_auto).values():
        is_auto = isinstance(auto, type) and issubclass(auto, auto_factory._BaseAutoModelClass)
        mapping: Any = getattr(auto, "_model_mapping", None) if is_auto else None
        if mapping is None or Qwen2Config not in mapping:
            continue
        if mapping[Qwen2Config] in {*MODELS, *MODELS.values()} or Qwen2Config in mapping._extra_content:
            found.append(auto)
    return found


def is_registered(auto: Any) -> bool:
    """Whether this Auto class builds a fixed class for Qwen2, by looking it up as transformers does."""
    return auto._model_mapping[Qwen2Config] in MODELS.values()


def _register_one(auto: Any) -> None:
    mapping = auto._model_mapping
    if is_registered(auto):
        return
    extra = mapping._extra_content
    before = extra.pop(Qwen2Config, _MISSING)  # so that the table answers with the stock class
    fixed = MODELS[mapping[Qwen2Config]]
    _before[auto] = before
    auto.register(Qwen2Config, fixed, exist_ok=True)
    if not is_registered(auto):  # 5.13.0 to 5.18.0 ignore a registration for a configuration of their own
        extra[Qwen2Config] = fixed
    if not is_registered(auto):
        raise RegistrationError(
            f"{auto.__name__} still builds a class of {mapping[Qwen2Config].__module__} after registering: this "
            "transformers keeps its table in an unknown way; use qwen2_fp16_fix.fix(model) on the loaded model instead."
        )


def replace_stock_names() -> None:
    """Lets `transformers.Qwen2ForCausalLM` and the other model names mean the fixed classes.

    For `qwen2-fp16-fix run`, whose program cannot be asked which way it loads; there is no way back within a process.
    """
    if is_switched_off():
        return
    for original, fixed in MODELS.items():
        setattr(sys.modules[original.__module__], original.__name__, fixed)
