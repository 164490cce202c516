"""Finds the keys of a layer in a cache of any kind, of any transformers release."""

import functools
from typing import Any

from torch import Tensor


def tensor_of(cache: Any, layer: int) -> Any:
    """What a cache holds for a layer: its keys, if they are a tensor (B, G, S, D or wider); else an object, or None."""
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    if layers is None:  # up to 4.53
        layers = getattr(cache, "key_cache", [])
    found: Any = layers[layer] if layer < len(layers) else None
    keys = found if isinstance(found, Tensor) else getattr(found, "keys", None)
    return keys if isinstance(keys, Tensor) and keys.dim() == 4 else found


def stored_keys(cache: Any, layer: int) -> Tensor | None:
    """The keys of a layer in a cache, (B, G, S, D or wider), or None. A static cache without tokens returns zeros."""
    keys = tensor_of(cache, layer)
    quantised = getattr(keys, "_quantized_keys", None)
    if quantised is not None:
        keys = keys._dequantize(quantised)
    is_there = isinstance(keys, Tensor) and keys.dim() == 4 and keys.numel() > 0 and not keys.is_meta
    return keys if is_there else None  # 4.49 makes static caches on the meta device


def is_emptied(cache: Any, layer: int, look: bool) -> bool:
    """Whether a marked cache holds no keys of a layer any more. look: read the numbers too, which waits for the GPU."""
    keys = stored_keys(cache, layer)
    return keys is None or (look and not bool(keys.any()))


def is_blank(cache: Any) -> bool:
    """Whether all keys in a cache are zeros: the empty places of a static cache. It waits for the GPU."""
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None) or getattr(cache, "key_cache", [])
    return all(is_emptied(cache, layer, look=True) for layer in range(len(layers)))


def stored_width(attention: Any, cache: Any) -> int | None:
    """The width that new keys of a layer must have in a cache; None if it can take any.

    Only transformers' own caches of plain tensors take any, while they hold no tensor for the layer: static ones up to
    4.55, and those that are told their shape before the first key, hold one from the start.
    """
    held = tensor_of(cache, attention.layer_idx)
    if isinstance(held, Tensor) and held.dim() == 4:
        return held.shape[-1]
    return None if has_plain_tensors(type(cache)) and has_plain_tensors(type(held)) else attention.head_dim


def has_plain_tensors(kind: type) -> bool:
    """Whether a cache of this class, or a layer of one, stores tensors as they are given, whatever their width.

    Most quantised caches are worse with wide keys. SinkCache rotates keys. Nothing is known of other tools' caches.
    """
    return _has_plain_tensors(kind)


has_plain_tensors._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def _has_plain_tensors(kind: type) -> bool:
    if kind.__module__ == "builtins" or issubclass(kind, Tensor):  # no layer yet, or a plain list of tensors
        return True
    names = [base.__name__ for base in kind.__mro__]
    return kind.__module__ == "transformers.cache_utils" and not any("Quantized" in x or "Sink" in x for x in names)


def is_sink(kind: type) -> bool:
    """Whether a cache of this class rotates its keys again later, and a centre with them: SinkCache, up to 4.52."""
    return _is_sink(kind)


is_sink._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch's compiler before 2.6 knows no names


@functools.lru_cache(maxsize=64)
def _is_sink(kind: type) -> bool:
    return any(base.__name__ == "SinkCache" for base in kind.__mro__)
