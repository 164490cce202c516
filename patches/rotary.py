"""The rotary embedding from transformers 4.45 on; v4_37.py has that of the releases before."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import planning
from .autocast import is_full_precision
from .symbolic import as_one_node, is_symbolic

#: RoPE variants whose frequencies no forward changes.
UNCHANGING = ("default", "linear", "yarn", "llama3", "proportional")


class RotaryEmbedding(nn.Module):
    """Cosine and sine tables in fp32, whatever dtype the model has or is cast to. Serves transformers from 4.45."""

    stock_parameters: ClassVar = ("x", "position_ids")
    stock_names: ClassVar = {"inv_freq", "attention_scaling", "config", "rope_type"}
    config: Any
    rope_type: str
    attention_scaling: float

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids (B, S) to cos and sin (B, S, D), in fp32 whatever the dtype of `x`; fp32 models get stock's.

        Stock computes angles by a matmul, at least up to 5.17. TF32 rounds its operands: position 16,001 to 16,000.
        """
        if is_symbolic(x):
            node: tuple[Tensor, Tensor] = as_one_node(self, x, (position_ids,))
            return node
        self.restore(x.device)
        if is_full_precision(x):
            stock: tuple[Tensor, Tensor] = super().forward(x, position_ids)
            return stock
        if self.rope_type not in UNCHANGING:  # stock chooses the frequencies by the farthest position
            super().forward(x, position_ids.amax().view(1, 1).float())  # an integer's would be in torch's default dtype
        angles = position_ids[..., None] * self.frequencies().to(x.device, torch.float32)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    def frequencies(self) -> Tensor:
        """Radians a token of each pair, (D/2,)."""
        return self._buffers["inv_freq"]  # type: ignore[return-value]

    def restore(self, device: torch.device) -> bool:
        """Recomputes frequencies that are on the meta device, unless `device` is that as well.

        No checkpoint holds them, so a model that was built on the meta device gets none with its weights.
        Compilers call this and do not trace it, and take its answer, which is always True, as a constant.
        """
        if self.frequencies().is_meta and device.type != "meta" and not planning.is_faked():
            self.recompute(device)
        return True

    restore._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def recompute(self, device: torch.device) -> None:
        """Replaces the frequencies by those that the constructor makes."""
        made = self.newly_made()
        self._buffers.update((name, buffer.to(device)) for name, buffer in made.named_buffers())
        kept = {name: value for name, value in vars(made).items() if isinstance(value, Tensor)}
        self.__dict__.update((name, value.to(device)) for name, value in kept.items())  # before 5.0, original_inv_freq

    def newly_made(self) -> nn.Module:
        """Another rotary embedding for the same configuration, in fp32 on the CPU."""
        with torch.inference_mode(False), torch.device("cpu"):  # a user may have set another default device
            return type(self)(config=self.config)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "RotaryEmbedding":
        """Follows `.to(device)` but not a cast: `.half()` would round the frequencies and turn far positions wrong.

        Frequencies that leave the meta device are recomputed. There `.to` refuses, and `.to_empty` keeps no numbers.
        """
        had_none = self.frequencies().is_meta
        try:
            self._apply_but_casts(fn, *args, **kwargs)
        except NotImplementedError:
            if not had_none:
                raise
            self.recompute(torch.device("cpu"))
            self._apply_but_casts(fn, *args, **kwargs)
        if had_none and not self.frequencies().is_meta:
            self.recompute(self.frequencies().device)
        return self

    def _apply_but_casts(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> None:
        """As nn.Module, but a buffer keeps its numbers, in fp32."""
        rounded: dict[str, Tensor] = self.__dict__.setdefault("rounded", {})
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for name, exact in before.items():
            after: Any = self._buffers[name]
            if after.dtype != exact.dtype:
                rounded[name] = after
            elif name in rounded:
                rounded[name] = fn(rounded[name])
            if after.is_meta or not exact.is_meta:
                self._buffers[name] = exact.to(after.device)  # neither rounded nor what `.to_empty` has left
        for name in [name for name, buffer in rounded.items() if buffer.is_meta]:
            del rounded[name]  # it holds no numbers, and could not be moved once the others have some

    def on_fixed(self, _: type[nn.Module]) -> None:
        """Recomputes frequencies that a cast has rounded, and keeps the rounded ones."""
        self.rounded: dict[str, Tensor] = {
            name: buffer
            for name, buffer in self._buffers.items()
            if buffer is not None and buffer.dtype != torch.float32 and buffer.device.type != "meta"
        }
        if self.rounded:
            exact = dict(self.newly_made().named_buffers())
            for name, buffer in self.rounded.items():
                self._buffers[name] = exact[name].to(buffer.device)

    def on_unfixed(self) -> None:
        """Gives the buffers the values that stock's would have now."""
        self._buffers.update(self.__dict__.pop("rounded", {}))
