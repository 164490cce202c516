"""The status: installed versions, registered Auto classes, and the parts of a model that are fixed."""

from collections import Counter
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from ._version import __version__
from .patches.errors import Qwen2FP16FixError
from .patches.lock import is_switched_off
from .patches.version_map import NUMERICS, SUPPORTED, is_untested, range_for
from .results import Record, Result

if TYPE_CHECKING:  # `status` must not need what only a terminal does
    from rich.text import Text


@dataclass(frozen=True)
class PartCount(Record):
    """How many parts of one class a model has, and how many of them are fixed."""

    fixed: int
    total: int


@dataclass(frozen=True)
class LayerStatus(Record):
    """How a fixed layer keeps its numbers in range.

    An exponent is that of the layer's plan, "by token" without a plan, or "not scaled": o_proj under flash attention
    before 4.48. Those of the inputs and of rotated queries and keys stay when a plan ends. Keys are "centred";
    "centred, bias rounded before", if a query or key projection has a hook, a forward of its own or an unknown class,
    or is called by stock's code; or "not centred", if the bias could not be read or an adapter changes it.
    """

    layer: int
    mlp: int | str  # the exponent of the MLP's product
    o_proj: int | str  # the exponent of what o_proj reads
    keys: str
    pairs_in_two_parts: int = 0  # of each key head: rotary pairs that turn and are stored as two float16 numbers
    pairs_left: int = 0  # of a key head: pairs that ask for it and are not, in the last forward
    why_left: str | None = None
    input_norm: int = 0  # the exponent of what q_proj, k_proj and v_proj read
    post_norm: int = 0  # the exponent of what gate_proj and up_proj read
    rotated: int = 0  # the exponent of rotated queries and keys

    def summary(self) -> str:
        """The layer in one line."""
        others = {name: getattr(self, name) for name in ("input_norm", "post_norm", "rotated")}
        exponents = "".join(f", {name} {exponent}" for name, exponent in others.items() if exponent)
        found = f"mlp {self.mlp}, o_proj {self.o_proj}{exponents}, keys {self.keys}"
        if self.pairs_in_two_parts:
            found += f", {self.pairs_in_two_parts} rotary pairs in two parts"
        if not self.pairs_left:
            return found
        pairs = "1 rotary pair" if self.pairs_left == 1 else f"{self.pairs_left} rotary pairs"
        return f"{found}, {pairs} not in two parts: {self.why_left}"


@dataclass(frozen=True, repr=False)
class ModelStatus(Result):
    """How far the Qwen2 inside a model is fixed."""

    class_name: str  # with its module; "class" in `to_dict`
    fixed: bool  # every part is fixed, and nothing overrides a part
    code: str | None  # "package", "remote" for code that came with the checkpoint, None while nothing is fixed
    module: str | None  # the entry module of that code
    numerics: int | None  # the version of the arithmetic of that code: an older export's is older than the package's
    parts: dict[str, PartCount]  # by the name of the stock class
    dtype: str | None  # of the first weight
    attention: str | None
    ranges: list[LayerStatus]  # of the fixed layers
    problem: str | None  # why the model is not fixed, or why its numbers cannot be trusted
    uncovered: list[str]  # what no certificate covers in the model as it is now

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        found = super().to_dict()
        return {"class": found.pop("class_name"), **found}

    def summary(self) -> str:
        """The result in one line."""
        state = "; ".join(("fixed", *self.uncovered)) if self.fixed else self.problem or "not fixed"
        return f"{self.class_name} in {self.dtype}, {self.attention}: {state}"

    def __rich__(self) -> "Text":
        """A line for each attribute, and for each layer."""
        from rich.text import Text

        shown = {name: value for name, value in self.to_dict().items() if name not in ("parts", "ranges")}
        shown["uncovered"] = "; ".join(self.uncovered) or None
        shown |= {role: f"{count.fixed} of {count.total} fixed" for role, count in self.parts.items()}
        for row in self.ranges:
            shown[f"layer {row.layer}"] = row.summary()
        return Text("\n".join(f"{name:>22}  {'' if value is None else value}" for name, value in shown.items()))


@dataclass(frozen=True, repr=False)
class Status(Result):
    """The result of `status`: the versions here, and whether the fix can be used and is on."""

    package: str  # the version of this package
    transformers: str
    torch: str
    numerics: int  # the version of the arithmetic
    supported: str  # the releases of transformers, as a requirement
    enabled: bool  # False under QWEN2_FP16_FIX=0
    patch: str | None  # the module that serves the installed transformers
    tested: bool  # whether the installed transformers is in the tested range
    registered: dict[str, bool]  # by the name of the Auto class
    problem: str | None  # why the fix cannot be used here
    model: ModelStatus | None = None  # of the model that was asked about; left out of `to_dict` if there is none

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data: what `status --json` prints."""
        found = super().to_dict()
        if self.model is None:
            del found["model"]
        return found

    def summary(self) -> str:
        """The result in one line."""
        state = self.problem or (f"patch {self.patch}" if self.enabled else "switched off by QWEN2_FP16_FIX=0")
        about = "" if self.model is None else f"; {self.model.summary()}"
        return f"{self.package} on transformers {self.transformers}, {state}{about}"

    def __rich__(self) -> "Text":
        """A line for each attribute. The command leaves `registered` out: its own process has nothing registered."""
        from rich.text import Text

        shown = {name: value for name, value in self.to_dict().items() if name not in ("registered", "model")}
        lines = [Text(f"{name:>12}  {'' if value is None else value}") for name, value in shown.items()]
        return Text("\n").join(lines if self.model is None else [*lines, Text(), self.model.__rich__()])


def status(model: nn.Module | None = None) -> Status:
    """The versions here, whether the fix can be used and is on, and with `model` which of its parts are fixed.

    Returns a Status: `problem` says why the fix cannot be used, `model.fixed` and `model.problem` how the model is.
    Never raises for an unsupported release: `problem` holds the sentence, and `model` is then None.
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
            check_structure(STOCK, PARTS, transformers.__version__)  # anew: a tool may have replaced code since
        else:
            about = examine_model(model)
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
                    f"layers.{index}.{found}: the model has not been loaded as it was saved; load it with a "
                    "transformers and a quantisation library that know the checkpoint."
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
    """Whether `model` holds a Qwen2 and every part of every Qwen2 in it is fixed, by this package or by remote code.

    False for anything else. Only the parts are looked at: `status` says how each layer is planned.
    """
    if not isinstance(model, nn.Module):
        return False
    try:
        from .code_copies import code_of, own_errors
        from .patches.attention import is_stock_eager

        code = code_of(model)
        with own_errors():
            code.check_modules(model)
            is_stock_eager(getattr(getattr(model, "config", None), "_attn_implementation", None))
    except Qwen2FP16FixError:  # no Qwen2, parts replaced by another tool, or an unsupported transformers
        return False
    total, fixed = count_parts(model, code)
    return total == fixed


def ranges_of(model: nn.Module) -> list[LayerStatus]:
    """How each fixed layer keeps its numbers in range.

    The weights are bounded anew, and a plan that was made for other weights is dropped.
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
                mlp, o_proj = layer.mlp.exponent, getattr(layer.self_attn, "exponent", "not scaled")
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
