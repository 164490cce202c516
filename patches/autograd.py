"""What autograd, a compiler, a tracer or torch.func needs of code that they run."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_recorded() -> bool:
    """Whether a compiler or torch.jit.trace runs this code now."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_transformed() -> bool:
    """Whether torch.func or forward-mode autograd runs this code; both refuse to write into memory that is given."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def backward_through(rounded: Tensor, exact: Tensor) -> Tensor:
    """`exact` itself, but a backward through it also reaches `rounded`, which was made of it by a cast.

    Stock multiplies by the rounded weights, so a user who retains their gradient gets one. A compiler or a tracer would
    have to trace an autograd function for that; it gets `exact` as it is.
    """
    if rounded is exact or not exact.requires_grad or is_recorded():
        return exact
    through: Tensor = BackwardThrough.apply(rounded, exact)  # type: ignore[no-untyped-call]
    return through


class BackwardThrough(torch.autograd.Function):
    """Returns its second argument. Each argument gets the gradient in its own dtype; together they get it once.

    `exact` gets what a rounding of the gradient leaves, and the rest comes back to it through `rounded`. So its
    gradient is as exact as without this function. Nothing is kept for the backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rounded: Tensor, exact: Tensor) -> Tensor:
        """Two tensors of one shape, `rounded` a cast of `exact`."""
        return exact.view_as(exact)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keeps the dtype that the first gradient must have."""
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of `rounded` and `exact`. One beyond the range of `rounded` is cut to it."""
        largest = torch.finfo(ctx.dtype).max
        rounded = gradient.clamp(-largest, largest).to(ctx.dtype)
        return rounded, gradient - rounded

    @staticmethod
    def jvp(ctx: Any, rounded: Tensor, exact: Tensor) -> Tensor:
        """The tangent of `exact`, which is that of the whole."""
        return exact.view_as(exact)
