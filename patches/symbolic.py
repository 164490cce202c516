"""What torch.fx makes of a fixed model: a graph with one node for each part, which runs the part itself.

A graph of a part's own steps would hold for one dtype and one plan, and be silently wrong for any other: a model that
is traced in fp32 takes stock's steps, and its graph would still take them when it is cast to float16. A node that runs
the part does whatever the part does then.
"""

from typing import Any, NoReturn

from torch import nn
from torch.fx import Proxy, Tracer

from .errors import SymbolicTraceError

REFUSAL = (
    "torch.fx cannot trace {what}, whose steps depend on dtypes and weights: trace the whole model without a cache, "
    "where each fixed part becomes one node, or call qwen2_fp16_fix.unfix(model) and keep it in float32."
)


def is_symbolic(value: Any) -> bool:
    """Whether this stands for a tensor in a trace of torch.fx."""
    return isinstance(value, Proxy)


def as_one_node(part: nn.Module, first: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """A node that calls `part` with these arguments when the graph runs. first: what `is_symbolic` was asked about.

    The others come as they are, not spread: vLLM looks for `**kwargs` in the text of a layer.

    Raises SymbolicTraceError if no node can name `part`, because it is not inside what is traced, or hold its
    arguments, such as a cache.
    """
    tracer = first.tracer
    try:
        path = tracer.path_of_module(part)
    except NameError:
        path = ""
    if not path:
        refuse(f"the inside of a fixed {type(part).__name__}")
    try:
        # transformers' tracer would call the part with tensors of the meta device, to learn what it returns.
        return Tracer.create_proxy(tracer, "call_module", path, (first, *args), kwargs or {})
    except NotImplementedError as error:
        refuse(f"a fixed {type(part).__name__} that is called with more than tensors ({error})")


def refuse(what: str = "the inside of a fixed part") -> NoReturn:
    """Raises SymbolicTraceError."""
    raise SymbolicTraceError(REFUSAL.format(what=what))
