"""The sites of a running Qwen2: hands over the numbers of each as the model computes them, and keeps none."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

FLOAT16_MAX = torch.finfo(torch.float16).max

#: The sites of a layer in the order of execution, with what messages call them.
SITES = {
    "input_norm": "input_layernorm output",
    "q": "q_proj output",
    "k": "k_proj output",
    "v": "v_proj output",
    "raw_scores": "raw scores q·k",
    "scaled_scores": "scaled scores",
    "attention": "attention output",
    "o_proj": "o_proj output",
    "residual_attention": "residual stream after attention",
    "post_norm": "post_attention_layernorm output",
    "gate": "gate_proj output",
    "up": "up_proj output",
    "product": "SwiGLU product",
    "down_proj": "down_proj output",
    "residual": "residual stream",
}
#: What comes before the first layer and after the last.
ENDS = {"embedding": "embedding", "final_norm": "final norm output", "logits": "logits"}

PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class Place(NamedTuple):
    """A site of a layer; the ends have no layer."""

    layer: int | None
    site: str

    def __str__(self) -> str:
        """As messages name it."""
        return ENDS[self.site] if self.layer is None else f"layer {self.layer}, {SITES[self.site]}"


class Attended(NamedTuple):
    """What scores are made of. query (B, H, S, D), key (B, G, K, D) of one head per G, both rotated."""

    layer: int
    query: Tensor
    key: Tensor
    scaling: float


See = Callable[[Place, Tensor], None]
WatchT = TypeVar("WatchT", bound="Watch")


class Watch(TorchFunctionMode):
    """While entered, hands `see` the tensor of every site of the layers, in the order of execution.

    Scores are the first matmul inside an attention, so they are seen where eager stores them: raw in a stock model,
    scaled in a fixed one. `attend` gets query and key, also where a fused kernel keeps the scores to itself.
    """

    def __init__(
        self, layers: Mapping[int, nn.Module], see: See, attend: Callable[[Attended], None] | None = None
    ) -> None:
        """layers: decoder layers by number. Hooks are placed on entering and taken off on leaving."""
        super().__init__()
        self.layers, self.see, self.attend = layers, see, attend
        self.attention: tuple[int, Any] | None = None  # the one that is running and has not multiplied yet
        self.hooks: list[RemovableHandle] = []

    def __enter__(self: WatchT) -> WatchT:
        """Places the hooks."""
        for number, layer in self.layers.items():
            self._watch(number, layer)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes the hooks off."""
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        while self.hooks:
            self.hooks.pop().remove()

    def _watch(self, number: int, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        outputs = {
            "input_norm": layer.input_layernorm,
            "q": attention.q_proj,
            "k": attention.k_proj,
            "v": attention.v_proj,
            "o_proj": attention.o_proj,
            "post_norm": layer.post_attention_layernorm,
            "gate": mlp.gate_proj,
            "up": mlp.up_proj,
            "down_proj": mlp.down_proj,
            "residual": layer,
        }
        inputs = {
            "attention": attention.o_proj,
            "residual_attention": layer.post_attention_layernorm,
            "product": mlp.down_proj,
        }

        def attention_starts(module: nn.Module, args: Any) -> None:
            self.attention = (number, module)

        self.hooks.append(attention.register_forward_pre_hook(attention_starts))
        for site, module in outputs.items():
            self.hooks.append(module.register_forward_hook(self._note_output(Place(number, site))))
        for site, module in inputs.items():
            self.hooks.append(module.register_forward_pre_hook(self._note_input(Place(number, site))))

    def _note_output(self, place: Place) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._hand_over(place, output[0] if isinstance(output, tuple) else output)

        return note

    def _note_input(self, place: Place) -> Any:
        def note(module: nn.Module, args: Any) -> None:
            self._hand_over(place, args[0])

        return note

    def _hand_over(self, place: Place, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            self.see(place, tensor.detach())

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Sees each attention's first matrix product, which makes the scores, and what fused attention is given."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if self.attention is not None:
            if function in PRODUCTS and args[0].dim() == 4:
                self._stock_scores(*self._ending(), args[0], args[1].transpose(-1, -2), result)
            elif function is torch.baddbmm:
                self._fixed_scores(*self._ending(), args[1], args[2].transpose(-1, -2), result)
            elif function is nn.functional.scaled_dot_product_attention:
                self._note_heads(*self._ending(), *args, **kwargs)
        return result

    def _ending(self) -> tuple[int, Any]:
        assert self.attention is not None
        running, self.attention = self.attention, None
        return running

    def _stock_scores(self, number: int, attention: Any, query: Tensor, key: Tensor, scores: Tensor) -> None:
        """Eager attention as stock has it: q by k of its own head, not yet scaled."""
        self._hand_over(Place(number, "raw_scores"), scores)
        self._note_heads(number, attention, query, key)

    def _fixed_scores(self, number: int, attention: Any, query: Tensor, key: Tensor, scores: Tensor) -> None:
        """Eager attention as the fix has it: all queries of a key head at once, in one list with the batch, scaled."""
        self._hand_over(Place(number, "scaled_scores"), scores)
        config = attention.config
        batch = len(key) // config.num_key_value_heads
        query = query.reshape(batch, config.num_attention_heads, -1, query.shape[-1])
        self._note_heads(number, attention, query, key.view(batch, -1, *key.shape[1:]))

    def _note_heads(self, number: int, attention: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.attend is not None:
            key = key[:, :: key.shape[1] // attention.config.num_key_value_heads]  # stock hands each over repeatedly
            with torch._C.DisableTorchFunction():
                self.attend(Attended(number, query.detach(), key.detach(), float(attention.head_dim) ** -0.5))
