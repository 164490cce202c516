"""The sites of a running Qwen2: hands over the numbers of each as the model computes them, and keeps none."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..patches.architecture import QWEN2, Architecture
from ..translations import SCAN_TEXTS

#: The sites of a layer in the order of execution, with their names in messages.
SITES = {site.name: site.title for site in QWEN2.watched_sites()}
#: The sites before the first layer and after the last, with their names in messages.
ENDS = {"embedding": "embedding", "final_norm": "final norm output", "logits": "logits"}
#: The sites of the scores: "raw", which a stock model stores, and "scaled", which a fixed one stores.
SCORES = {str(s.at).removeprefix("scores:"): s.name for s in QWEN2.sites if str(s.at).startswith("scores:")}

PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class SitePlace(NamedTuple):
    """A site of a layer; the ends have no layer."""

    layer: int | None
    site: str

    def __str__(self) -> str:
        """The name in messages."""
        return ENDS[self.site] if self.layer is None else f"layer {self.layer}, {SITES[self.site]}"


def place_text(place: str, language: str) -> str:
    """The name of a place in messages, in a language. place: as `SitePlace` says it in English."""
    layer, _, title = place.rpartition(", ")
    name = next((name for name, known in (SITES | ENDS).items() if known == title), None)
    if language == "en" or name is None:
        return place
    texts = SCAN_TEXTS[language]
    number = [texts["layer"].format(layer=layer.removeprefix("layer "))] if layer else []
    return texts["comma"].join([*number, texts[f"site_{name}"]])


def execution_order(place: SitePlace) -> tuple[int, int]:
    """Sorts places as they are computed."""
    if place.layer is None:
        return (-1, 0) if place.site == "embedding" else (10**9, list(ENDS).index(place.site))
    return place.layer, list(SITES).index(place.site)


class Attended(NamedTuple):
    """The operands of the scores. query (B, H, S, D), key (B, G, K, D) of one head per G, both rotated."""

    layer: int
    query: Tensor
    key: Tensor
    scaling: float


OnSite = Callable[[SitePlace, Tensor], None]
OnAttention = Callable[[Attended], None]
WatchT = TypeVar("WatchT", bound="Watch")


class Watch(TorchFunctionMode):
    """While entered, hands `on_site` the tensor of every site of the layers, in the order of execution.

    Scores are the first matrix product inside an attention, so they are seen where eager attention stores them: raw in
    a stock model, scaled in a fixed one. `on_attention` gets query and key, also where a fused kernel keeps the scores
    to itself.
    """

    def __init__(
        self,
        layers: Mapping[int, nn.Module],
        on_site: OnSite,
        on_attention: OnAttention | None = None,
        row: Architecture = QWEN2,
    ) -> None:
        """layers: decoder layers of the row, by number. Hooks are placed on entering and removed on leaving."""
        super().__init__()
        self.layers, self.on_site, self.on_attention, self.row = layers, on_site, on_attention, row
        self.attention: tuple[int, Any] | None = None  # the one that runs and has not made its scores yet
        self.hooks: list[RemovableHandle] = []

    def __enter__(self: WatchT) -> WatchT:
        """Places the hooks."""
        for number, layer in self.layers.items():
            self._place_hooks(number, layer)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes the hooks off."""
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        while self.hooks:
            self.hooks.pop().remove()

    def _place_hooks(self, number: int, layer: nn.Module) -> None:
        def attention_starts(module: nn.Module, args: Any) -> None:
            self.attention = (number, module)

        attention = layer.get_submodule(self.row.path("attention"))
        self.hooks.append(attention.register_forward_pre_hook(attention_starts))
        for site in self.row.watched_sites():
            if site.module is None:
                continue
            module, place = layer.get_submodule(site.module), SitePlace(number, site.name)
            if site.is_input:
                self.hooks.append(module.register_forward_pre_hook(self._note_input(place)))
            else:
                self.hooks.append(module.register_forward_hook(self._note_output(place)))

    def _note_output(self, place: SitePlace) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._hand_over(place, output[0] if isinstance(output, tuple) else output)

        return note

    def _note_input(self, place: SitePlace) -> Any:
        def note(module: nn.Module, args: Any) -> None:
            self._hand_over(place, args[0])

        return note

    def _hand_over(self, place: SitePlace, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            self.on_site(place, tensor.detach())

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Sees the scores, which are an attention's first matrix product, and the operands of fused attention.

        The fixed eager attention makes its scores by `baddbmm` (numerics.py): another function there would go unseen.
        """
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
        """The attention that runs. From here on its scores count as seen."""
        assert self.attention is not None
        running, self.attention = self.attention, None
        return running

    def _stock_scores(self, number: int, attention: Any, query: Tensor, key: Tensor, scores: Tensor) -> None:
        """Hands over the scores of stock's eager attention, not yet scaled. Each query head has its own key head."""
        self._hand_over(SitePlace(number, SCORES["raw"]), scores)
        self._note_heads(number, attention, query, key)

    def _fixed_scores(self, number: int, attention: Any, query: Tensor, key: Tensor, scores: Tensor) -> None:
        """Hands over the scores of the fix's eager attention, scaled. Batch and key heads are one dimension there."""
        self._hand_over(SitePlace(number, SCORES["scaled"]), scores)
        config = attention.config
        batch = len(key) // config.num_key_value_heads
        query = query.reshape(batch, config.num_attention_heads, -1, query.shape[-1])
        self._note_heads(number, attention, query, key.view(batch, -1, *key.shape[1:]))

    def _note_heads(
        self, number: int, attention: Any, query: Tensor, key: Tensor, *others: Any, **options: Any
    ) -> None:
        """Hands over the operands of eager or fused attention; others, options: the kernel's other arguments."""
        if self.on_attention is not None:
            key = key[:, :: key.shape[1] // attention.config.num_key_value_heads]  # stock repeats each key head
            query, key = (each[..., : attention.head_dim] for each in (query, key))  # a quantised cache holds one part
            with torch._C.DisableTorchFunction():
                if rotated := getattr(getattr(attention, "ranges", None), "rotated", 0):  # a fixed layer scales both
                    query, key = (each.float() * 2.0**rotated for each in (query, key))
                self.on_attention(Attended(number, query.detach(), key.detach(), float(attention.head_dim) ** -0.5))
