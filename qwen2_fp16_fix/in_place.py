"""Fixes a model that is already loaded, and undoes it."""

import logging
from typing import Any, TypeVar

from .code_copies import code_of, model_in, own_errors
from .patches.errors import ForeignCacheError
from .patches.lock import is_switched_off

logger = logging.getLogger("qwen2_fp16_fix")

ModelT = TypeVar("ModelT")


def fix(model: ModelT) -> ModelT:
    """Fixes every Qwen2 inside `model`, in place, and returns `model`.

    model: any Qwen2 class of transformers, or a module that holds one: PEFT, DataParallel, torch.compile's
    OptimizedModule, a multimodal model, a SentenceTransformer; or a pipeline, a Trainer or an HFLM of lm-eval, which
    have one as their `model`. Parameters, buffers and state-dict names stay as they are. A model built by
    remote code of this project is fixed already and keeps its code.
    Raises NotQwen2Error (no Qwen2 inside), PatchConflictError (another tool has replaced a part), MetaTensorError
    (weights not loaded) or UnsupportedTransformersError. After an error nothing has changed.
    With QWEN2_FP16_FIX=0 in the environment it changes nothing and logs a warning.
    """
    if is_switched_off():
        logger.warning("QWEN2_FP16_FIX=0: the fix is switched off, the model stays stock")
        return model
    root = model_in(model)
    with own_errors():
        code_of(root).fix_modules(root)
    return model


def unfix(model: ModelT) -> ModelT:
    """Makes every Qwen2 inside `model` stock again, in place and bit for bit, and returns `model`.

    A model built by `register` keeps its drop-in class, which by itself changes no arithmetic.
    Raises what `fix` raises.
    """
    root = model_in(model)
    with own_errors():
        code_of(root).unfix_modules(root)
    return model


def adopt_cache(cache: Any, model: Any, centred: bool = True) -> Any:
    """Marks whose keys a cache holds, if it lost its mark: rebuilt from tensors, or read from a file. Returns `cache`.

    cache: a cache object of transformers; model: the fixed model it is for, or what has it as its `model`. centred:
    whether a model with this fix and the same weights has filled it, in float16 or bf16. If not, its keys come from a
    stock model, from an fp32 model or from training, and new keys in it will not be centred either. With the wrong
    answer attention goes to the wrong tokens, and no error says so.
    Raises ForeignCacheError for a tuple of tensors, and otherwise what `fix` raises.
    """
    root = model_in(model)
    code = code_of(root)
    if not hasattr(code, "adopt_cache"):
        raise ForeignCacheError(
            "this model runs the code of an export made by 0.1.0, which marks no caches: export it anew, or run the "
            "prompt again with a new cache."
        )
    with own_errors():
        code.adopt_cache(root, cache, centred)
    return cache
