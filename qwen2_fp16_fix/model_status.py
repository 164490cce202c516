"""Says what is installed, what is registered and which parts of a model are fixed."""

import os
from collections import Counter
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn

from ._version import __version__
from .patches.errors import Qwen2FP16FixError
from .patches.version_map import NUMERICS, SUPPORTED, is_untested, range_for


def status(model: nn.Module | None = None) -> dict[str, Any]:
    """A plain dict, fit for JSON, of what runs here.

    Keys: `package`, `transformers`, `torch` (versions); `numerics` (the version of the arithmetic: the same number, the
    same arithmetic); `supported`; `enabled` (False under QWEN2_FP16_FIX=0); `patch` (the module that serves this
    release, or None); `tested` (whether the release is in the tested range); `registered` (Auto class name to bool);
    `problem` (why the fix cannot be used here, or None); and, for a model, `model` with `class`, `fixed`, `code`
    ("package", or "remote" for code that came with the checkpoint; None while nothing is fixed), `module` (that code's
    entry module), `parts` (class name to fixed and total counts), `dtype`, `attention`, `ranges` (per layer) and
    `problem`.
    Never raises for an unsupported release: the sentence is under `problem`.
    """
    found: dict[str, Any] = {
        "package": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "numerics": NUMERICS,
        "supported": SUPPORTED,
        "enabled": os.environ.get("QWEN2_FP16_FIX", "").strip() != "0",
        "patch": None,
        "tested": False,
        "registered": {},
        "problem": None,
    }
    try:
        found["patch"] = range_for(transformers.__version__).module
        found["tested"] = not is_untested(transformers.__version__)
        from .registration.register import (  # raises where the installed source does not fit
            is_registered,
            qwen2_auto_classes,
        )

        found["registered"] = {auto.__name__: is_registered(auto) for auto in qwen2_auto_classes()}
        if model is not None:
            found["model"] = model_status(model)
    except Qwen2FP16FixError as error:
        found["problem"] = str(error)
    return found


def model_status(model: nn.Module) -> dict[str, Any]:
    """Which parts of the Qwen2 inside `model` are fixed; the model is when all are and nothing overrides them."""
    from .code_copies import code_of, origin_of, own_errors
    from .patches.blocks import is_stock_eager

    code = code_of(model)
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    problem = None
    try:
        with own_errors():
            code.check_modules(model)
            is_stock_eager(attention)  # raises for one whose scores are float16
    except Qwen2FP16FixError as error:
        problem = str(error)
    problem = problem or load_problem(model, code)
    total, fixed = count_parts(model, code)
    weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "fixed": problem is None and bool(total) and total == fixed,
        "code": origin_of(code) if any(fixed.values()) else None,
        "module": code.__name__ if any(fixed.values()) else None,
        "parts": {role: {"fixed": fixed[role], "total": count} for role, count in total.items()},
        "dtype": None if weights is None else str(weights).removeprefix("torch."),
        "attention": attention,
        "ranges": ranges_of(model),
        "problem": problem,
    }


def load_problem(model: nn.Module, code: Any) -> str | None:
    """A sentence on fixed layers that compute in range with numbers that are none of the checkpoint's."""
    from .patches.swap import known_class, layers_of
    from .running_code import stock_classes, stock_of

    if not hasattr(code, "load_problem"):  # code of a checkpoint that 0.1.0 has exported
        return None
    for base in code.base_models(model, stock_classes(code)):
        for index, layer in enumerate(layers_of(base)):
            found = code.load_problem(layer) if known_class(layer, stock_of(code)) else None
            if found:
                return (
                    f"layers.{index}.{found}: the model has not been loaded as it was saved; load it with a "
                    "transformers and a quantisation library that know the checkpoint."
                )
    return None


def count_parts(model: nn.Module, code: ModuleType) -> tuple[Counter[str], Counter[str]]:
    """How many parts of each role there are in a model, and how many of them are fixed by this copy of `patches/`."""
    from .patches.swap import known_class
    from .running_code import stock_classes, stock_of

    total, fixed = Counter[str](), Counter[str]()
    for module in model.modules():
        role = next((part for part in code.PARTS if isinstance(module, getattr(stock_classes(code), part))), None)
        if role is not None:
            total[role] += 1
            fixed[role] += known_class(module, stock_of(code)) is not None
    return total, fixed


def is_fixed(model: Any) -> bool:
    """Whether `model` holds a Qwen2 and every part of every Qwen2 in it is fixed, by this package or by remote code.

    False for whatever is no such model. It looks at the parts alone: `status` says how each layer is planned.
    """
    if not isinstance(model, nn.Module):
        return False
    try:
        from .code_copies import code_of, own_errors
        from .patches.blocks import is_stock_eager

        code = code_of(model)
        with own_errors():
            code.check_modules(model)
            is_stock_eager(getattr(getattr(model, "config", None), "_attn_implementation", None))
    except Qwen2FP16FixError:  # no Qwen2, one that another tool has changed, or a transformers that is not supported
        return False
    total, fixed = count_parts(model, code)
    return total == fixed


def ranges_of(model: nn.Module) -> list[dict[str, Any]]:
    """How each fixed layer keeps its MLP and its output projection in range, and how it stores its keys.

    No plan is believed: the weights are bounded anew, and a plan that is not theirs is dropped.

    An exponent of the plan, "by token", or "not scaled" (o_proj under flash attention before 4.48); "centred",
    "centred, bias rounded before" (a query or key projection has a hook, a forward of its own or a class that nobody
    has looked at, or is called by stock's code) or "not centred" (the bias could not be read, or an adapter changes
    it).
    """
    from .code_copies import code_of, sibling
    from .patches.swap import known_class, layers_of

    code = code_of(model)
    key_state, planning = sibling(code, "key_centring", "keys").key_state, sibling(code, "planning")
    check_plan = getattr(planning, "check_plan", None) or planning.drop_stale_plan  # of a checkpoint exported by 0.1.0
    found = []
    for base in code.base_models(model, stock_classes(code)):
        for index, layer in enumerate(layers_of(base)):
            if known_class(layer, stock_of(code)):
                check_plan(layer)
                exponents = {"mlp": layer.mlp.exponent, "o_proj": getattr(layer.self_attn, "exponent", "not scaled")}
                named = {site: "by token" if value is None else value for site, value in exponents.items()}
                found.append({"layer": index, **named, "keys": key_state(layer.self_attn)})
    return found
