"""Whether a thread asks for stock models, although Qwen2 is registered."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_stock_wanted: ContextVar[bool] = ContextVar("qwen2_fp16_fix_stock_wanted", default=False)


@contextlib.contextmanager
def stock_models() -> Iterator[None]:
    """Lets this thread build stock models inside a with block, whatever is registered.

    That goes for the Auto classes and every class by its name. Models that exist stay as they are, and `fix` works.
    """
    before = _stock_wanted.set(True)
    try:
        yield
    finally:
        _stock_wanted.reset(before)


def stock_is_wanted() -> bool:
    """Whether this thread is inside `stock_models`."""
    return _stock_wanted.get()
