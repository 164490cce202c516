"""Watches a running Qwen2 and notes the largest magnitude at each site where float16 can overflow."""

import math
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

FLOAT16_MAX = torch.finfo(torch.float16).max


class Magnitudes(TorchFunctionMode):
    """While entered, records |x| at every layer of `model`: raw scores, SwiGLU products, block outputs, residual.

    Raw scores are the first matmul inside an attention module, so they are seen in eager only. The largest magnitude
    of a site is NaN or inf once a value there is.
    """

    def __init__(self, model: nn.Module) -> None:
        """model: any module with a Qwen2Model inside; hooks are placed on entering and taken off on leaving."""
        super().__init__()
        self.found: dict[str, float] = {}
        self.attention: str | None = None  # the layer whose attention is running and has not multiplied yet
        self.layers = next(m.layers for m in model.modules() if hasattr(m, "layers"))
        self.hooks: list[RemovableHandle] = []

    def __enter__(self) -> "Magnitudes":
        """Places the hooks."""
        for index, layer in enumerate(self.layers):  # type: ignore[arg-type]
            self._watch(layer, f"layer {index}")
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes the hooks off."""
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        while self.hooks:
            self.hooks.pop().remove()

    def _watch(self, layer: Any, name: str) -> None:
        def attention_starts(module: nn.Module, args: Any) -> None:
            self.attention = name

        def note(site: str) -> Any:
            return lambda module, args, output: self.note(f"{name}, {site}", output)

        self.hooks += [
            layer.self_attn.register_forward_pre_hook(attention_starts),
            layer.self_attn.o_proj.register_forward_hook(note("o_proj output")),
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda module, args: self.note(f"{name}, SwiGLU product", args[0])
            ),
            layer.mlp.register_forward_hook(note("down_proj output")),
            layer.register_forward_hook(note("residual stream")),
        ]

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Notes the first matrix product of each attention, which is q·kᵀ before it is scaled."""
        result = function(*args, **(kwargs or {}))
        is_product = function in (torch.matmul, Tensor.matmul, Tensor.__matmul__)
        if is_product and self.attention is not None and args[0].dim() == 4:
            self.note(f"{self.attention}, raw scores q·k", result)
            self.attention = None
        return result

    def note(self, site: str, output: Any) -> None:
        """Records the largest |output|, NaN where there is one."""
        tensor = output[0] if isinstance(output, tuple) else output
        with torch._C.DisableTorchFunction():
            largest = float(tensor.detach().float().abs().max())
        before = self.found.get(site, 0.0)
        self.found[site] = largest if math.isnan(largest) or largest > before else before

    def largest(self, count: int) -> list[dict[str, Any]]:
        """The `count` sites with the largest magnitudes, largest first."""
        ranked = sorted(self.found.items(), key=lambda item: -item[1])[:count]
        return [{"site": site, "magnitude": magnitude} for site, magnitude in ranked]

    def first_overflow(self) -> str | None:
        """The first site, in the order of execution, that held a value that is not finite."""
        return next((site for site, magnitude in self.found.items() if not math.isfinite(magnitude)), None)
