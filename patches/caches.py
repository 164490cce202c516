"""The mark of a cache: how its keys and values are stored. All of a layer have to be stored alike.

A fixed attention marks each cache that it fills, layer by layer, with the version of the centre of its keys and the
exponent of its values. Whether pairs are in two parts shows in the width of the keys.
"""

from typing import Any

import torch
from torch import Tensor

from .cache_origin import is_learned_prefix, look_ours, note_tracing
from .cached_keys import is_emptied, stored_keys
from .errors import ForeignCacheError
from .swap import layers_of

MARKS = "qwen2_fp16_marks"  # of a cache: layer to the mark of its keys
MARKS_BEFORE = "qwen2_fp16_centred"  # up to 0.1.1: layer to whether its keys are centred; values were not scaled
TOLD = "told"  # beside them: whether the keys without a mark are this model's, once they were looked at

#: What the keys of a layer are stored by: the version of their centre (0: none) and their own exponent, as one number.
#: And the exponent of its values, which are stored times 2^-exponent. A plain tuple, so that a pickled cache needs no
#: class of this file.
Mark = tuple[int, int]
STOCK: Mark = (0, 0)
UNKNOWN = 1  # a version that no centre here has


def claim_cache(attention: Any, cache: Any, own: Mark, marks_last: bool) -> Mark:
    """The mark of this layer in a cache once new keys are among the old ones; the cache is marked with it.

    own: what this attention would mark an empty cache with. The result is `own`, or the mark of the old keys where new
    ones can be stored as these are: uncentred ones, if the cache is a stock model's, or with another exponent of the
    values. See `joined`.
    marks_last: True from transformers 5.4, which itself rebuilds no cache. Keys in an unmarked cache then come from a
    stock model, were learned, or the user has rebuilt the cache. Before, beam search and others rebuild caches without
    their marks, so an unmarked cache is this model's unless its keys clearly are a stock model's.
    Raises ForeignCacheError if old and new keys cannot share a cache, or if that cannot be told: mixed, they would lead
    attention to the wrong tokens, and nothing would show it.
    """
    if cache is None:
        return own
    if torch.compiler.is_compiling():
        note_tracing()
        known = getattr(cache, MARKS, None)  # the compiler guards what it reads; compiled code sets no mark
        found: Mark = own if known is None else known.get(attention.layer_idx, own)
        if found == own or can_follow(found, own):
            return found
        raise ForeignCacheError(MIXED.format(attention.layer_idx))
    layer, marks = attention.layer_idx, cache.__dict__.setdefault(MARKS, {})
    mark = joined(attention, cache, marks, own, marks_last)
    marks[layer] = mark
    return mark


def joined(attention: Any, cache: Any, marks: dict[Any, Any], own: Mark, marks_last: bool) -> Mark:
    """What `claim_cache` returns.

    | the old keys                                  | new keys by `own`                                    |
    |-----------------------------------------------|------------------------------------------------------|
    | none, or all removed                          | as `own`                                             |
    | marked as `own`                               | as `own`                                             |
    | marked as a stock model's                     | as a stock model's                                   |
    | this centre, another exponent of the values   | with the exponent of the old ones                    |
    | another centre, or now there is none          | refused                                              |
    | not marked                                    | as their numbers tell (`look_ours`), or refused      |

    The old keys are looked at only where the table asks for them: that waits for the GPU.
    """
    layer = attention.layer_idx
    mark = marks.get(layer)
    if mark is None:
        mark = mark_before(attention, cache)
    if mark is None:
        mark = own if own == STOCK else mark_of_keys(attention, cache, marks, own, marks_last)
    if mark == own:
        return own
    if can_follow(mark, own):
        return own if is_emptied(cache, layer, look=False) else mark
    if is_emptied(cache, layer, look=True):
        return own
    raise ForeignCacheError(MIXED.format(layer))


MIXED = (
    "this cache holds keys of layer {} from another dtype, other weights or another state of the fix, which cannot be "
    "mixed with this model's: run the prompt again with a new cache."
)


def can_follow(mark: Mark, own: Mark) -> bool:
    """Whether an attention that would mark a cache with `own` can store new keys beside those marked with `mark`."""
    return own != STOCK and (mark == STOCK or mark[0] == own[0])


def note_keys(keys: Tensor, mark: Mark) -> None:
    """Marks the keys themselves. Up to 4.47 each step of a generation moves them to a new cache, in a tuple."""
    if not torch.compiler.is_compiling():
        setattr(keys, MARKS, mark)


def mark_before(attention: Any, cache: Any) -> Mark | None:
    """What the mark that a release up to 0.1.1 has left in a cache says now; None without one."""
    centred = getattr(cache, MARKS_BEFORE, {}).get(attention.layer_idx)
    if not centred:
        return None if centred is None else STOCK
    return (UNKNOWN if attention.centre is None else attention.centre.version, 0)


def mark_of_keys(attention: Any, cache: Any, marks: dict[Any, Any], own: Mark, marks_last: bool) -> Mark:
    """The mark of the old keys of a layer in a cache without one; `own` if there are none.

    What the keys tell holds for all layers, and is kept with the marks. Raises ForeignCacheError if they do not tell.
    """
    keys = stored_keys(cache, attention.layer_idx)
    if keys is None:
        return own
    if hasattr(keys, MARKS):
        return getattr(keys, MARKS)  # type: ignore[no-any-return]
    differs = (own[1], attention.ranges.rotated, keys.shape[-1]) != (0, 0, attention.head_dim)
    is_ours = marks.get((TOLD, differs))
    if is_ours is None:
        witnesses = tuple(attention.witnesses.values())
        is_ours = not is_learned_prefix() and look_ours(cache, witnesses, marks_last, differs)
        marks[TOLD, differs] = is_ours
    return own if is_ours else STOCK


def mark_cache(base: Any, cache: Any, centred: bool) -> None:
    """Marks every layer of a cache as holding keys of the fixed Qwen2Model `base`; or uncentred ones, if not `centred`.

    Raises ForeignCacheError for a cache that cannot hold a mark, such as a tuple, or a model that is not fixed.
    """
    attentions = [layer.self_attn for layer in layers_of(base)]
    if any(getattr(attention, "witnesses", None) is None for attention in attentions):
        raise ForeignCacheError(
            "this model is not fixed, so a cache cannot be marked for it: call qwen2_fp16_fix.fix(model) first."
        )
    if not hasattr(cache, "__dict__"):
        raise ForeignCacheError(
            f"a {type(cache).__name__} of tensors cannot hold a mark that says whose keys it holds: convert it to a "
            "DynamicCache first."
        )
    marks = cache.__dict__.setdefault(MARKS, {})
    for attention in attentions:
        marks[attention.layer_idx] = own_mark(attention.centre, attention.ranges) if centred else STOCK


def own_mark(centre: Any, ranges: Any) -> Mark:
    """What an attention with this centre, or None, and these exponents marks an empty cache with."""
    return ((0 if centre is None else centre.version) ^ 2 * ranges.rotated, ranges.values)  # versions are odd
