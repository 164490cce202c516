"""Whether a thread asks for stock models, although Qwen2 is registered."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_stock_wanted: ContextVar[bool] = ContextVar("qwen2_fp16_fix_stock_wanted", default=False)


@contextlib.contextmanager
def stock_models() -> Iterator[None]:
    """Builds stock models inside a with block, in this thread, whatever is registered.

    It applies to the Auto classes and to transformers' own classes used by name. Existing models do not change, and
    `fix` still works::

        with qwen2_fp16_fix.stock_models():
            stock = AutoModelForCausalLM.from_pretrained("checkpoint")
    """
    before = _stock_wanted.set(True)
    try:
        yield
    finally:
        _stock_wanted.reset(before)


def stock_is_wanted() -> bool:
    """Whether this thread is inside `stock_models`."""
    return _stock_wanted.get()
