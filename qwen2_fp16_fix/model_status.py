"""The status: installed versions, registered Auto classes, and the parts of a model that are fixed."""

from collections import Counter
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn

from ._version import __version__
from .patches.errors import NotQwen2Error, Qwen2FP16FixError
from .patches.lock import is_switched_off
from .patches.version_map import NUMERICS, SUPPORTED, is_untested, range_for
from .status_result import LayerStatus, ModelStatus, PartCount, Status


def status(model: Any = None) -> Status:
    """Says whether the fix can be used here and is switched on, and how far a model is fixed.

    It does not raise for an unsupported release of transformers: `problem` then holds the sentence, and `model` is
    None.

    Args:
        model: A loaded model to look at as well, or an object that has one as its `model`: a pipeline, a Trainer, an
            HFLM of lm-eval.

    Returns:
        The versions, `problem` with the reason if the fix cannot be used, and `model` with what was found in the
        model: `fixed`, `problem`, and the state of each layer in `ranges`.

    Raises:
        NotQwen2Error: `model` is not a model and has none.
    """
    patch, tested, problem = None, False, None
    registered: dict[str, bool] = {}
    about = None
    try:
        patch = range_for(transformers.__version__).module
        tested = not is_untested(transformers.__version__)
        from .patches.modeling_qwen2_fp16 import PARTS, STOCK  # raises if the installed source does not fit
        from .patches.structure import check_structure
        from .registration.register import is_registered, qwen2_auto_classes

        registered = {auto.__name__: is_registered(auto) for auto in qwen2_auto_classes()}
        if model is None:
            check_structure(STOCK, PARTS, transformers.__version__)  # again: a tool may have replaced code since
        else:
            from .code_copies import model_in

            about = examine_model(model_in(model))
    except NotQwen2Error:  # this is not a model at all; what a model lacks is said by `examine_model`
        raise
    except Qwen2FP16FixError as error:
        problem = str(error)
    return Status(
        package=__version__,
        transformers=transformers.__version__,
        torch=torch.__version__,
        numerics=NUMERICS,
        supported=SUPPORTED,
        enabled=not is_switched_off(),
        patch=patch,
        tested=tested,
        registered=registered,
        problem=problem,
        model=about,
    )


def examine_model(model: nn.Module) -> ModelStatus:
    """How far the Qwen2 inside `model` is fixed. It is fixed if every part is and nothing overrides a part."""
    from .certification.in_memory import uncovered
    from .code_copies import code_of, origin_of, own_errors, sibling
    from .patches.attention import is_stock_eager
    from .patches.attention_form import described

    code = code_of(model)
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    problem = None
    try:
        with own_errors():
            code.check_modules(model)
            is_stock_eager(attention)  # raises if this implementation keeps its scores in float16
    except Qwen2FP16FixError as error:
        problem = str(error)
    problem = problem or load_problem(model, code)
    total, fixed = count_parts(model, code)
    weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return ModelStatus(
        class_name=f"{type(model).__module__}.{type(model).__qualname__}",
        fixed=problem is None and bool(total) and total == fixed,
        code=origin_of(code) if any(fixed.values()) else None,
        module=code.__name__ if any(fixed.values()) else None,
        numerics=sibling(code, "version_map").NUMERICS if any(fixed.values()) else None,
        parts={role: PartCount(fixed[role], count) for role, count in total.items()},
        dtype=None if weights is None else str(weights).removeprefix("torch."),
        attention=described(attention),
        ranges=ranges_of(model),
        problem=problem,
        uncovered=uncovered(model),
    )


def load_problem(model: nn.Module, code: Any) -> str | None:
    """A sentence about a fixed layer without the checkpoint's weights, or None. Its numbers are finite but wrong."""
    from .code_copies import stock_classes, stock_of
    from .patches.swap import known_class, layers_of

    if not hasattr(code, "load_problem"):  # the code of a checkpoint that 0.1.0 exported
        return None
    for base in code.base_models(model, stock_classes(code)):
        for index, layer in enumerate(layers_of(base)):
            found = code.load_problem(layer) if known_class(layer, stock_of(code)) else None
            if found:
                return (
                    f"layers.{index}.{found}: the model was not loaded as it was saved; load it with versions of "
                    "transformers and of the quantisation library that support the checkpoint."
                )
    return None


def count_parts(model: nn.Module, code: ModuleType) -> tuple[Counter[str], Counter[str]]:
    """The number of parts of each role in a model, and the number that this copy of `patches/` has fixed."""
    from .code_copies import stock_classes, stock_of
    from .patches.swap import known_class

    total, fixed = Counter[str](), Counter[str]()
    for module in model.modules():
        role = next((part for part in code.PARTS if isinstance(module, getattr(stock_classes(code), part))), None)
        if role is not None:
            total[role] += 1
            fixed[role] += known_class(module, stock_of(code)) is not None
    return total, fixed


def is_fixed(model: Any) -> bool:
    """Whether a model contains a Qwen2 and every part of every Qwen2 in it is fixed, by this package or by remote code.

    Only the parts are looked at. `status` says how each layer keeps its numbers in range.

    Args:
        model: Any object.

    Returns:
        True for a fixed model, False for anything else.
    """
    try:
        from .code_copies import code_of, model_in, own_errors
        from .patches.attention import is_stock_eager

        root = model_in(model)
        code = code_of(root)
        with own_errors():
            code.check_modules(root)
            is_stock_eager(getattr(getattr(root, "config", None), "_attn_implementation", None))
    except Qwen2FP16FixError:  # no Qwen2, parts replaced by another tool, or an unsupported transformers
        return False
    total, fixed = count_parts(root, code)
    return total == fixed


def ranges_of(model: nn.Module) -> list[LayerStatus]:
    """How each fixed layer keeps its numbers in range.

    The weights are bounded again, and a plan that was made for other weights is dropped.
    """
    from .code_copies import code_of, sibling, stock_classes, stock_of
    from .patches.swap import known_class, layers_of

    code = code_of(model)
    form, planning = sibling(code, "attention_form", "key_centring", "keys"), sibling(code, "planning")
    check_plan = getattr(planning, "check_plan", None) or planning.drop_stale_plan  # of a checkpoint exported by 0.1.0
    found = []
    for base in code.base_models(model, stock_classes(code)):
        for index, layer in enumerate(layers_of(base)):
            if known_class(layer, stock_of(code)):
                check_plan(layer)
                mlp, o_proj = (getattr(part, "exponent", "not scaled") for part in (layer.mlp, layer.self_attn))
                state = form.key_state(layer.self_attn)  # a string in exports up to 0.1.1
                keys = (state,) if isinstance(state, str) else state
                row = LayerStatus(index, _named(mlp), _named(o_proj), *keys)
                found.append(with_kept_exponents(row, layer))
    return found


def with_kept_exponents(row: LayerStatus, layer: Any) -> LayerStatus:
    """The row with the exponents that stay when a plan ends. Layers of exports up to 0.1.1 have none."""
    ranges = getattr(layer.self_attn, "ranges", None)
    return replace(
        row,
        input_norm=getattr(ranges, "input", 0),
        post_norm=getattr(layer.mlp, "input_exponent", 0),
        rotated=getattr(ranges, "rotated", 0),
    )


def _named(exponent: int | str | None) -> int | str:
    return "by token" if exponent is None else exponent
