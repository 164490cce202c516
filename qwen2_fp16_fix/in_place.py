"""Fixes a model that is already loaded, and undoes it."""

import logging
from typing import Any, TypeVar

from .code_copies import code_of, model_in, own_errors
from .patches.errors import ForeignCacheError
from .patches.lock import is_switched_off

logger = logging.getLogger("qwen2_fp16_fix")

ModelT = TypeVar("ModelT")


def fix(model: ModelT) -> ModelT:
    """Fixes every Qwen2 inside a loaded model, in place.

    Parameters, buffers and state-dict names stay as they are. A model built by remote code of this project is fixed
    already and keeps its code. With QWEN2_FP16_FIX=0 in the environment nothing changes, and a warning is logged.
    After an error the model is unchanged.

    Args:
        model: A model of any Qwen2 class of transformers; a module that contains one: PEFT, DataParallel,
            torch.compile's OptimizedModule, a multimodal model, a SentenceTransformer; or an object that has one as
            its `model`: a pipeline, a Trainer, an HFLM of lm-eval.

    Returns:
        The same `model`.

    Raises:
        NotQwen2Error: There is no Qwen2 inside.
        PatchConflictError: Another tool has replaced a part.
        MetaTensorError: Weights are not loaded.
        UnsupportedTransformersError: The installed transformers cannot be fixed.
    """
    if is_switched_off():
        logger.warning("QWEN2_FP16_FIX=0: the fix is switched off, the model stays stock")
        return model
    root = model_in(model)
    with own_errors():
        code_of(root).fix_modules(root)
    return model


def unfix(model: ModelT) -> ModelT:
    """Makes every Qwen2 inside a model stock again, in place and bit for bit.

    A model built after `register` keeps its drop-in class, which by itself changes no arithmetic.

    Args:
        model: A fixed model, or what contains one, as for `fix`.

    Returns:
        The same `model`.

    Raises:
        NotQwen2Error: There is no Qwen2 inside.
        PatchConflictError: Another tool has replaced a part.
        UnsupportedTransformersError: The installed transformers cannot be fixed.
    """
    root = model_in(model)
    with own_errors():
        code_of(root).unfix_modules(root)
    return model


def adopt_cache(cache: Any, model: Any, centred: bool = True) -> Any:
    """Marks a KV cache that has lost its mark with whose keys it holds.

    A fixed model marks each cache that it fills. A cache that was rebuilt from tensors or read from a file has no mark.

    Args:
        cache: A cache object of transformers.
        model: The fixed model that will continue with the cache, or what contains it, as for `fix`.
        centred: Whether a model with this fix and the same weights has filled the cache, in float16 or bfloat16. If
            False, its keys come from a stock model, from a model in float32 or from training, and new keys in it will
            not be centred either. With the wrong value attention goes to the wrong tokens, and no error says so.

    Returns:
        The same `cache`.

    Raises:
        ForeignCacheError: `cache` is a tuple of tensors, `model` is not fixed, or its code is an older export's.
        NotQwen2Error: There is no Qwen2 inside `model`.
    """
    root = model_in(model)
    code = code_of(root)
    if not hasattr(code, "adopt_cache"):
        raise ForeignCacheError(
            "this model runs the code of an export made by 0.1.0, which marks no caches: export it again, or run the "
            "prompt again with a new cache."
        )
    with own_errors():
        code.adopt_cache(root, cache, centred)
    return cache
