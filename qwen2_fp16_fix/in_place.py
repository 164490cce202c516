"""Fixes a model that is already loaded, and undoes it."""

import logging
from typing import Any, TypeVar

from torch import nn

from .code_copies import code_of, own_errors
from .patches.errors import ForeignCacheError
from .patches.modeling_qwen2_fp16 import is_switched_off

logger = logging.getLogger("qwen2_fp16_fix")

ModelT = TypeVar("ModelT", bound=nn.Module)


def fix(model: ModelT) -> ModelT:
    """Fixes every Qwen2 inside `model`, in place, and returns `model`.

    model: any Qwen2 class of transformers, or a module that holds one: PEFT, DataParallel, torch.compile's
    OptimizedModule, a multimodal model. Parameters, buffers and state-dict names stay as they are. A model that remote
    code of this project has built is fixed already and keeps its code.
    Raises NotQwen2Error (no Qwen2 inside), PatchConflictError (another tool has replaced a part), MetaTensorError
    (weights not loaded) or UnsupportedTransformersError, and then has changed nothing.
    With QWEN2_FP16_FIX=0 in the environment it changes nothing and logs a warning.
    """
    if is_switched_off():
        logger.warning("QWEN2_FP16_FIX=0: the fix is switched off, the model stays stock")
        return model
    with own_errors():
        code_of(model).fix_modules(model)
    return model


def unfix(model: ModelT) -> ModelT:
    """Makes every Qwen2 inside `model` stock again, in place and bit for bit, and returns `model`.

    Raises as `fix` does. A drop-in class, as `register` builds it, keeps its class; that alone does nothing.
    """
    with own_errors():
        code_of(model).unfix_modules(model)
    return model


def adopt_cache(cache: Any, model: nn.Module, centred: bool = True) -> Any:
    """Says whose keys a cache holds that lost its mark: rebuilt from its tensors, or read from a file. Returns `cache`.

    cache: a cache object of transformers; model: the fixed model it is for. With `centred`, a model with this fix and
    the same weights has filled it, in float16 or bf16. Without, its keys are a stock model's or an fp32 model's, or
    were learned, and new ones in it will not be centred either. Said wrongly, attention goes to the wrong tokens, and
    nothing shows it.
    Raises ForeignCacheError for a tuple of tensors, and otherwise as `fix` does.
    """
    code = code_of(model)
    if not hasattr(code, "adopt_cache"):
        raise ForeignCacheError(
            "this model runs the code of an export made by 0.1.0, which marks no caches: export it anew, or run the "
            "prompt again with a new cache."
        )
    with own_errors():
        code.adopt_cache(model, cache, centred)
    return cache
