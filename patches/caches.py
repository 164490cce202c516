"""Whether the keys in a cache are centred: all of them have to be, by the same vector, or none.

A fixed attention marks each cache that it fills, layer by layer. A cache that is rebuilt from its tensors, read from a
disk or mapped over has no marks. Then the keys themselves tell: a centre c takes out of them the bias, which all of
them have in common. With k the mean key of a layer and b - c the part of its bias that centring leaves,
<k - (b - c), c> / <c, c> is 0 for centred keys and 1 for a stock model's. The projected tokens have something in common
as well, which disturbs the measure less the longer c is. So the sum over the layers follows those with a long c: it is
0.00 and 1.00 for the published spikes.

Keys are rotated, so only pairs count that hardly turn within the first tokens.
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import ForeignCacheError
from .swap import layers_of

TOKENS = 256  # the first tokens of a row, whose keys are averaged
TURN = 0.5  # the most that a pair may turn within them, in radians
#: How near 0 or 1 the measure has to be for a decision.
NEAR = 0.25
#: The least <c, c>, relative to the mean square of the keys, for a decision. Along a shorter centre tokens have as much
#: in common by chance; the measure has been between -2 and 20 there.
LONG = 2.0**-4
#: A centre that is shorter than this, relative to the keys, is below half a float16 step of them and does not matter.
SHORT = 2.0**-11

MARKS = "qwen2_fp16_keys"  # of a cache: layer to the mark of its keys
TOLD = "told"  # beside them: whether the keys without a mark are this model's, once they were looked at

#: The version of the centre that the keys of a layer have (0: none), and the exponent of its values, which are stored
#: times 2^-exponent. A plain tuple, so that a pickled cache needs no class of this file.
Mark = tuple[int, int]
STOCK: Mark = (0, 0)
TRACED: list[bool] = []  # not empty once a compiler has traced an attention with a cache, in this process
LEARNED = ("PREFIX_TUNING", "CARTRIDGE")  # PEFT's methods that pass a learned cache to the model


class Witness(NamedTuple):
    """The two vectors of a layer that its keys are measured by, (G, D) in fp32 on the CPU; 0 in pairs that turn."""

    layer: int
    centre: Tensor  # c
    rest: Tensor  # b - c, the part of the bias that centring leaves


def witness(layer: int, key_shift: Tensor, frequencies: Tensor, mean: tuple[Tensor, Tensor]) -> Witness:
    """The witness of a layer with the shift -c (1, G, 1, D); c is the bias times `mean`, real and imaginary (D/2,)."""
    left, right = key_shift[0, :, 0].cpu().double().neg().chunk(2, -1)
    frequencies = frequencies.cpu().double()
    slow = frequencies * TOKENS <= TURN
    pairs = torch.complex(left, right) * slow
    rest = torch.where(slow, pairs / torch.complex(*mean) - pairs, 0)
    return Witness(layer, *(torch.cat((x.real, x.imag), -1).float() for x in (pairs, rest)))


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


def is_sink(cache: Any) -> bool:
    """Whether a cache rotates its keys again later, and a centre with them: SinkCache does, up to 4.52."""
    return any(kind.__name__ == "SinkCache" for kind in type(cache).__mro__)


def note_tracing() -> bool:
    """Remembers that compiled code may fill caches with centred keys from now on; it cannot mark them."""
    TRACED.append(True)
    return True


note_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]  # run while Dynamo traces, not in the graph


def note_keys(keys: Tensor, mark: Mark) -> None:
    """Marks the keys themselves. Up to 4.47 each step of a generation moves them to a new cache, in a tuple."""
    if not torch.compiler.is_compiling():
        setattr(keys, MARKS, mark)


def tensor_of(cache: Any, layer: int) -> Any:
    """What a cache holds for a layer: its keys, if they are a tensor (B, G, S, D or wider); else an object, or None."""
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    if layers is None:  # up to 4.53
        layers = getattr(cache, "key_cache", [])
    found: Any = layers[layer] if layer < len(layers) else None
    keys = getattr(found, "keys", None)
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


def mark_of_keys(attention: Any, cache: Any, marks: dict[Any, Any], own: Mark, marks_last: bool) -> Mark:
    """The mark of the old keys of a layer in a cache without one; `own` if there are none.

    What the keys tell holds for all layers, and is kept with the marks. Raises ForeignCacheError if they do not tell.
    """
    keys = stored_keys(cache, attention.layer_idx)
    if keys is None:
        return own
    if hasattr(keys, MARKS):
        return getattr(keys, MARKS)  # type: ignore[no-any-return]
    scaled = own[1] != 0
    is_ours = marks.get((TOLD, scaled))
    if is_ours is None:
        witnesses = tuple(attention.witnesses.values())
        is_ours = not is_learned_prefix() and look_ours(cache, witnesses, marks_last, scaled)
        marks[TOLD, scaled] = is_ours
    return own if is_ours else STOCK


def look_ours(cache: Any, witnesses: tuple[Witness, ...], marks_last: bool, scaled: bool) -> bool:
    """Whether the keys in a cache without marks look like this model's, and not like a stock model's.

    scaled: whether this model would scale its values. If not, and its centre is too short to matter, both are alike.
    """
    along, centre, size = measure(cache, witnesses)
    if size == 0 and (not scaled or is_blank(cache)):
        return True
    if centre <= size * SHORT**2 and not scaled:
        return False
    is_told = size > 0 and centre >= size * LONG
    if is_told and abs(along - centre) <= NEAR * centre:
        return False
    if not marks_last or (TRACED and (not is_told or abs(along) <= NEAR * centre)):
        return True
    raise ForeignCacheError(
        "this cache holds keys, no mark that says whether they are centred, and they do not look like a stock model's. "
        "If a model with this fix and these weights has filled it, say so with "
        "qwen2_fp16_fix.adopt_cache(cache, model); if they were learned, or are a stock model's after all, with "
        "adopt_cache(cache, model, centred=False); or run the prompt again with a new cache."
    )


def stored_width(attention: Any, cache: Any) -> int | None:
    """The width that new keys of a layer must have in a cache; None if it can take any.

    Only transformers' own caches of plain tensors take any, while they hold no tensor for the layer: static ones up to
    4.55, and those that are told their shape before the first key, hold one from the start.
    """
    held = tensor_of(cache, attention.layer_idx)
    if isinstance(held, Tensor) and held.dim() == 4:
        return held.shape[-1]
    return None if has_plain_tensors(type(cache)) and has_plain_tensors(type(held)) else attention.head_dim  # type: ignore[no-any-return]


def has_plain_tensors(kind: type) -> bool:
    """Whether a cache of this class, or a layer of one, stores tensors as they are given, whatever their width.

    Most quantised caches are worse with wide keys. SinkCache rotates keys. Nothing is known of other tools' caches.
    """
    if kind.__module__ == "builtins" or issubclass(kind, Tensor):  # no layer yet, or a plain list of tensors
        return True
    names = [base.__name__ for base in kind.__mro__]
    return kind.__module__ == "transformers.cache_utils" and not any("Quantized" in x or "Sink" in x for x in names)


has_plain_tensors._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_blank(cache: Any) -> bool:
    """Whether all keys in a cache are zeros: the empty places of a static cache. It waits for the GPU."""
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None) or getattr(cache, "key_cache", [])
    return all(is_emptied(cache, layer, look=True) for layer in range(len(layers)))


def measure(cache: Any, witnesses: tuple[Witness, ...]) -> list[float]:
    """The sums over the layers of a cache of the numbers that `compare` returns; zeros without keys.

    The first over the second is about 0 for centred keys and 1 for a stock model's. It waits for the GPU once.
    """
    found = [
        compare(keys.detach()[:, :, :TOKENS].float(), seen)
        for seen in witnesses
        if (keys := stored_keys(cache, seen.layer)) is not None
    ]
    if not found:
        return [0.0, 0.0, 0.0]
    first = found[0]
    sums: list[float] = torch.stack([each.to(first.device) for each in found]).sum(0).tolist()
    return sums


def compare(keys: Tensor, seen: Witness) -> Tensor:
    """<k - (b - c), c>, <c, c> and the mean square length of the keys (B, G, S, D) of a layer, (3,); zeros for none.

    Keys of zeros do not count: they are the empty places of a static cache. Nor do channels behind the D of a head.
    """
    centre, rest = (x.to(keys.device) for x in (seen.centre, seen.rest))
    keys = keys[..., : centre.shape[-1]]
    count = keys.any(-1).any(1).sum()
    mean = keys.sum((0, 2)) / count.clamp(min=1)
    sums = torch.stack(
        [((mean - rest) * centre).sum(), centre.square().sum(), keys.square().sum() / count.clamp(min=1)]
    )
    return sums * (count > 0)


def is_learned_prefix() -> bool:
    """Whether a PEFT model is running that passes a learned cache on: a new one at each call, without marks.

    The frames of the call stack tell, whether the model was fixed before PEFT wrapped it or after.
    """
    frame = sys._getframe() if "peft" in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__") == "peft.peft_model":
            chosen = getattr(frame.f_locals.get("self"), "active_peft_config", None)
            if getattr(chosen, "peft_type", None) in LEARNED:
                return True
        frame = frame.f_back
    return False


def mark_cache(base: Any, cache: Any, centred: bool) -> None:
    """Marks every layer of a cache as holding keys of the fixed Qwen2Model `base`; or uncentred ones, if not `centred`.

    Raises ForeignCacheError for a cache that is no object of a class, or a model that is not fixed.
    """
    attentions = [layer.self_attn for layer in layers_of(base)]
    if any(getattr(attention, "witnesses", None) is None for attention in attentions):
        raise ForeignCacheError("this model is not fixed, so it has no say in whose keys a cache holds: fix it first.")
    if not hasattr(cache, "__dict__"):
        raise ForeignCacheError(
            f"a {type(cache).__name__} of tensors cannot say whose keys it holds: make a DynamicCache of it first."
        )
    marks = cache.__dict__.setdefault(MARKS, {})
    for attention in attentions:
        marks[attention.layer_idx] = own_mark(attention) if centred else STOCK


def own_mark(attention: Any) -> Mark:
    """What an attention marks an empty cache with when it runs in float16."""
    return (0 if attention.centre is None else attention.centre.version, attention.ranges.values)
