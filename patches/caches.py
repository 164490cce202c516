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

MARKS = "qwen2_fp16_centred"  # of a cache: layer to whether its keys are centred
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


def claim_cache(attention: Any, cache: Any, shift: Tensor | None, marks_last: bool) -> Tensor | None:
    """The shift for new keys of this layer in a cache; marks the cache as holding such keys.

    It is `shift`, or None for a cache that holds uncentred keys: all keys of a cache have to share one constant, and
    None stands for 0. See `will_be_centred`.
    marks_last: True from transformers 5.4, which itself rebuilds no cache. Keys in an unmarked cache then come from a
    stock model, were learned, or the user has rebuilt the cache. Before, beam search and others rebuild caches without
    their marks, so an unmarked cache is this model's unless its keys clearly are a stock model's.
    Raises ForeignCacheError if one of old and new keys is centred and the other is not, or if that cannot be told:
    mixed, they would lead attention to the wrong tokens, and nothing would show it.
    """
    if cache is None:
        return shift
    if torch.compiler.is_compiling():
        note_tracing()
        known = getattr(cache, MARKS, None)  # the compiler guards what it reads; compiled code sets no mark
        return None if known is not None and known.get(attention.layer_idx) is False else shift
    layer, marks = attention.layer_idx, cache.__dict__.setdefault(MARKS, {})
    centred = will_be_centred(attention, cache, marks, shift is not None, marks_last)
    if centred and shift is None:
        raise ForeignCacheError(
            f"this cache holds keys of layer {layer} from another dtype or another state of the fix, which cannot be "
            "mixed with this model's: run the prompt again with a new cache."
        )
    marks[layer] = centred
    return shift if centred else None


def will_be_centred(attention: Any, cache: Any, marks: dict[int, bool], wanted: bool, marks_last: bool) -> bool:
    """Whether the keys of a layer in a cache are centred once new ones are among them. `claim_cache` refuses one case.

    | mark of the layer | new keys are centred (`wanted`)       | new keys are not                         |
    |-------------------|---------------------------------------|------------------------------------------|
    | none              | as the old keys are; True without any | False                                    |
    | centred           | True                                  | False if emptied, else True: the refusal |
    | uncentred         | True if emptied, else False           | False                                    |

    The old keys are looked at only where the table asks for them: that waits for the GPU.
    """
    marked = marks.get(attention.layer_idx)
    if marked is None:
        return wanted and holds_centred(attention, cache, marks, marks_last)
    if marked == wanted or not is_emptied(cache, attention.layer_idx, look=marked):
        return marked
    return wanted


def note_tracing() -> bool:
    """Remembers that compiled code may fill caches with centred keys from now on; it cannot mark them."""
    TRACED.append(True)
    return True


note_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]  # run while Dynamo traces, not in the graph


def note_keys(keys: Tensor, shift: Tensor | None) -> None:
    """Marks the keys themselves. Up to 4.47 each step of a generation moves them to a new cache, in a tuple."""
    if not torch.compiler.is_compiling():
        setattr(keys, MARKS, shift is not None)


def stored_keys(cache: Any, layer: int) -> Tensor | None:
    """The keys of a layer in a cache, (B, G, S, D), or None. A static cache without tokens returns zeros."""
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    if layers is None:  # up to 4.53
        layers = getattr(cache, "key_cache", [])
    found: Any = layers[layer] if layer < len(layers) else None
    quantised = getattr(found, "_quantized_keys", None)
    keys = getattr(found, "keys", found) if quantised is None else found._dequantize(quantised)
    is_there = isinstance(keys, Tensor) and keys.dim() == 4 and keys.numel() > 0 and not keys.is_meta
    return keys if is_there else None  # 4.49 makes static caches on the meta device


def is_emptied(cache: Any, layer: int, look: bool) -> bool:
    """Whether a marked cache holds no keys of a layer any more. look: read the numbers too, which waits for the GPU."""
    keys = stored_keys(cache, layer)
    return keys is None or (look and not bool(keys.any()))


def holds_centred(attention: Any, cache: Any, marks: dict[int, bool], marks_last: bool) -> bool:
    """Whether the old keys of a layer in a cache without a mark for it are centred; True if there are none.

    The answer holds for all layers, whose marks are set with it. Raises ForeignCacheError if there is no answer.
    """
    keys = stored_keys(cache, attention.layer_idx)
    if keys is None:
        return True
    if hasattr(keys, MARKS):
        return bool(getattr(keys, MARKS))
    witnesses = tuple(attention.witnesses.values())
    centred = not is_learned_prefix() and look_centred(cache, witnesses, marks_last)
    for seen in witnesses:
        if stored_keys(cache, seen.layer) is not None:
            marks.setdefault(seen.layer, centred)
    return centred


def look_centred(cache: Any, witnesses: tuple[Witness, ...], marks_last: bool) -> bool:
    """Whether the keys in a cache look centred; True without any keys, False if the centre is too short to matter."""
    along, centre, size = measure(cache, witnesses)
    if size == 0:
        return True
    if centre <= size * SHORT**2:
        return False
    is_told = centre >= size * LONG
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

    Keys of zeros do not count: they are the empty places of a static cache.
    """
    centre, rest = (x.to(keys.device) for x in (seen.centre, seen.rest))
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
        marks[attention.layer_idx] = centred and getattr(attention, "shift", None) is not None
