"""Loads a checkpoint as a stock or a fixed model, quietly, and runs it.

The entry of `patches/` is imported where it is used: it raises if the installed transformers is not supported, and
`quiet` and the devices must work there as well.
"""

import contextvars
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..errors import CheckpointError, first_line
from ..patches.errors import Qwen2FP16FixError
from .config import dtype_keyword


def load(folder: Path, fixed: bool, dtype: torch.dtype, attention: str) -> nn.Module:
    """The checkpoint as a stock or a fixed Qwen2ForCausalLM, in eval mode."""
    with quiet():
        loaded = build(fixed, causal_class(fixed).from_pretrained, folder, **load_options(dtype, attention))
    model: nn.Module = loaded.eval()
    return model


def causal_class(fixed: bool) -> Any:
    """The fixed or the stock Qwen2ForCausalLM."""
    from ..patches.modeling_qwen2_fp16 import STOCK, Qwen2ForCausalLM

    return Qwen2ForCausalLM if fixed else STOCK.Qwen2ForCausalLM


def load_options(dtype: torch.dtype, attention: str) -> dict[str, Any]:
    """Keyword arguments of from_pretrained and _from_config, by their names in the installed transformers."""
    return {"attn_implementation": attention, dtype_keyword(transformers.__version__): dtype}


def build(fixed: bool, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """make(*args, **kwargs), a fixed or a stock model, whatever else is registered or asked for by this thread."""
    if fixed:
        return contextvars.Context().run(make, *args, **kwargs)  # in an empty context no block of stock_models runs
    from ..patches.stock_wanted import stock_models

    with stock_models():
        return make(*args, **kwargs)


@torch.no_grad()
def forward(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits (1, S, vocabulary) of tokens (1, S)."""
    logits: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return logits


@contextmanager
def checkpoint_at_fault(said: str, advice: str = "", passed: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """For a block of transformers' own code. A bad config makes it raise any error: that becomes a CheckpointError.

    said, advice: of its sentence, before and behind the first line of what was raised. passed: errors that go on as
    they are, as this project's own do.
    """
    try:
        yield
    except (Qwen2FP16FixError, *passed):  # type: ignore[misc]  # mypy does not follow a tuple into a tuple
        raise
    except Exception as error:
        raise CheckpointError(f"{said} ({first_line(error)}){advice}.") from error


def first_run() -> AbstractContextManager[None]:
    """For the first forward of a model by a config."""
    said, advice = "transformers cannot run a model by this config.json", ": restore the original one"
    return checkpoint_at_fault(said, advice, (MemoryError, OSError))


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' notices and progress bars out of our own output. Errors still raise."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


def default_device() -> str:
    """The device to run on if none is asked for: cuda if there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_problem(device: str) -> Exception | None:
    """The error of torch when it cannot compute on a device of that name; None when it can."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        return error
    return None
