"""Makes transformers build fixed Qwen2 models, by its Auto classes and by the classes' own names, and undoes it."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.models.auto import auto_factory, modeling_auto

from ..locking import require_lock
from ..patches.errors import RegistrationError
from ..patches.lock import is_switched_off
from ..patches.modeling_qwen2_fp16 import DROP_IN_OF, STOCK
from . import construction
from .construction import MISSING

logger = logging.getLogger("qwen2_fp16_fix")

Qwen2Config: Any = STOCK.Qwen2Config

#: Auto class to the class registered there for Qwen2 before, or MISSING, and to ours.
_before: dict[Any, tuple[Any, Any]] = {}
_lock = threading.RLock()  # for the variables here and transformers' tables
_asked = False  # whether `register` has asked for the fix, and `unregister` has not taken it back
_blocks = 0  # of `registered`, running in any thread


def register(lock: str | Path | None = None) -> None:
    """Fixes every Qwen2 that this process builds from now on, whichever way it is built.

    AutoModel, AutoModelForCausalLM and the Auto classes of every Qwen2 head build the drop-in classes. transformers'
    own classes, used by name or inside another model, are fixed at the end of their construction. It does not matter
    when their names were imported. Subclasses of Qwen2Model and code that comes with a checkpoint run as they are. They
    are fixed if their parts are Qwen2's; otherwise a NotFixedWarning names them.

    Calling it again changes nothing. After an error nothing is registered. With QWEN2_FP16_FIX=0 in the environment it
    does nothing and logs a warning.

    Args:
        lock: A file made by `qwen2_fp16_fix.lock`. Anything that differs from it is then an error.

    Raises:
        UnsupportedTransformersError: The installed transformers cannot be fixed.
        PatchConflictError: Another tool has replaced parts of transformers' Qwen2.
        RegistrationError: An Auto class still builds another class afterwards.
        LockError: Something differs from the lock.
        LockFileError: The file is not a lock.
    """
    global _asked
    if _may_apply(lock):
        with _lock:
            _apply()
            _asked = True


def unregister() -> None:
    """Lets transformers build the classes that it built before `register`. Existing models stay as they are.

    While a block of `registered` runs, in this thread or another, the fix stays registered until the last block ends.
    """
    global _asked
    with _lock:
        _asked = False
        _undo_unless_wanted()


@contextlib.contextmanager
def registered(lock: str | Path | None = None) -> Iterator[None]:
    """Registers the fix for the length of a with block.

    For example::

        with qwen2_fp16_fix.registered():
            model = AutoModelForCausalLM.from_pretrained("checkpoint", dtype=torch.float16)

    A registration made before the block, or by another block, stays. The errors are those of `register`, raised before
    the block begins.

    Args:
        lock: As for `register`.
    """
    global _blocks
    if not _may_apply(lock):
        yield
        return
    with _lock:
        _apply()
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            _undo_unless_wanted()


def _may_apply(lock: str | Path | None) -> bool:
    """Whether the environment allows the fix. Raises LockError or LockFileError if the lock forbids it."""
    if lock is not None:
        require_lock(lock)
    if is_switched_off():
        logger.warning("QWEN2_FP16_FIX=0: the fix is switched off, Qwen2 models are built from the stock classes")
        return False
    return True


def _apply() -> None:
    """Registers every class that is not registered yet. After an error nothing is registered, unless it was before."""
    try:
        if not construction.is_watching():
            construction.watch()
        for auto in qwen2_auto_classes():
            _register_one(auto)
    except BaseException:
        _undo_unless_wanted()
        raise


def _undo_unless_wanted() -> None:
    """Undoes the registration if neither `register` nor a block of `registered` wants it."""
    if _asked or _blocks:
        return
    construction.unwatch()
    for auto, (before, ours) in _before.items():
        table: Any = auto._model_mapping._extra_content
        if table.get(Qwen2Config) is not ours:  # transformers 4.45 to 4.52 put a checkpoint's own class there
            continue
        del table[Qwen2Config]
        if before is not MISSING:
            table[Qwen2Config] = before
    _before.clear()


def qwen2_auto_classes() -> list[Any]:
    """The Auto classes that build a Qwen2 class with a fixed counterpart, each once."""
    found: list[Any] = []
    for auto in vars(modeling_auto).values():
        is_auto = isinstance(auto, type) and issubclass(auto, auto_factory._BaseAutoModelClass)
        mapping: Any = getattr(auto, "_model_mapping", None) if is_auto else None
        if mapping is None or Qwen2Config not in mapping:
            continue
        if mapping[Qwen2Config] in {*DROP_IN_OF, *DROP_IN_OF.values()} or Qwen2Config in mapping._extra_content:
            found.append(auto)
    return found


def is_registered(auto: Any) -> bool:
    """Whether this Auto class builds a fixed class for Qwen2, by looking it up as transformers does."""
    return auto._model_mapping[Qwen2Config] in DROP_IN_OF.values()


def _register_one(auto: Any) -> None:
    """Makes one Auto class build our class for Qwen2. Raises RegistrationError if it still builds another."""
    mapping = auto._model_mapping
    if is_registered(auto):
        return
    extra = mapping._extra_content
    before = extra.pop(Qwen2Config, MISSING)  # so that the table answers with the stock class
    fixed = DROP_IN_OF[mapping[Qwen2Config]]
    _before[auto] = (before, fixed)
    auto.register(Qwen2Config, fixed, exist_ok=True)
    if not is_registered(auto):  # 5.13.0 to 5.18.0 ignore a registration for a configuration of their own
        extra[Qwen2Config] = fixed
    if not is_registered(auto):
        raise RegistrationError(
            f"{auto.__name__} still builds a class of {mapping[Qwen2Config].__module__} after registering: this "
            "release of transformers keeps its table in an unknown way; call qwen2_fp16_fix.fix(model) on the model."
        )
