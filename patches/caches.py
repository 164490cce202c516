"""Whose keys a cache holds: all have to be centred, by the same vector, or none.

A cache that a fixed attention fills is marked, layer by layer. A cache rebuilt from its tensors, read from a disk or
mapped over is not. What it holds shows in the keys themselves: a centre c takes out of them what all have in common,
the bias. With k the mean key of a layer and b - c what centring leaves of its bias, <k - (b - c), c> / <c, c> is 0 for
centred keys and 1 for a stock model's, up to what the projected tokens have in common, which the length of c divides.
The sum over the layers leaves the decision to those with a long c: 0.00 and 1.00 where the published spikes are.

Keys are rotated, so only pairs that hardly turn within the tokens that are looked at count.
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import ForeignCacheError
from .swap import layers_of

TOKENS = 256  # of a row, the first ones, to take the mean over
TURN = 0.5  # the most that a pair may turn within them, in radians
#: How near 0 or 1 the measure has to be to say one or the other.
NEAR = 0.25
#: The least <c, c>, relative to the mean square of the keys, at which it says anything: along a shorter centre tokens
#: have as much in common by chance, and the measure has been anywhere between -2 and 20.
LONG = 2.0**-4
#: A centre that is shorter than this, relative to the keys, is shorter than what rounds them off, and cannot matter.
SHORT = 2.0**-11

MARKS = "qwen2_fp16_centred"  # of a cache: layer to whether its keys are centred
TRACED: list[bool] = []  # not empty once a compiler has traced an attention with a cache, in this process
LEARNED = ("PREFIX_TUNING", "CARTRIDGE")  # PEFT's names of what hands over a cache that was learned


class Witness(NamedTuple):
    """What tells the keys of one layer, in pairs that hardly turn, and 0 elsewhere: (G, D) in fp32 on the CPU."""

    layer: int
    centre: Tensor  # c
    rest: Tensor  # what is left of the bias


def witness(layer: int, key_shift: Tensor, frequencies: Tensor, mean: tuple[Tensor, Tensor]) -> Witness:
    """For a layer with the shift -c (1, G, 1, D), where c is the bias times `mean`, real and imaginary part (D/2,)."""
    left, right = key_shift[0, :, 0].cpu().double().neg().chunk(2, -1)
    frequencies = frequencies.cpu().double()
    slow = frequencies * TOKENS <= TURN
    pairs = torch.complex(left, right) * slow
    rest = torch.where(slow, pairs / torch.complex(*mean) - pairs, 0)
    return Witness(layer, *(torch.cat((x.real, x.imag), -1).float() for x in (pairs, rest)))


def claim_cache(attention: Any, cache: Any, shift: Tensor | None, marks_last: bool) -> Tensor | None:
    """The shift for new keys in a cache, which is marked as holding such keys of this layer: `shift`, or none.

    None for a cache that holds uncentred keys: 0 is a constant, too, and all keys have to share one.
    marks_last: transformers itself rebuilds no cache. Where it does, in beam search for one, a cache without marks is
    this model's unless it clearly is a stock model's.
    Raises ForeignCacheError where old keys and new ones are of two sorts, or may be: mixed, they would point to the
    wrong tokens, and nothing would show it.
    """
    if cache is None:
        return shift
    if torch.compiler.is_compiling():
        note_tracing()
        known = getattr(cache, MARKS, None)  # read, and guarded, by the compiler; nothing is looked at or marked
        return None if known is not None and known.get(attention.layer_idx) is False else shift
    layer, marks = attention.layer_idx, cache.__dict__.setdefault(MARKS, {})
    wanted, centred = shift is not None, marks.get(layer)
    if centred is None:
        centred = wanted and holds_centred(attention, cache, marks, marks_last)
    elif centred != wanted and is_emptied(cache, layer, look=centred):
        centred = wanted
    if centred and shift is None:
        raise ForeignCacheError(
            f"this cache holds keys of layer {layer} from another dtype or another state of the fix, which cannot be "
            "mixed with this model's: run the prompt again with a new cache."
        )
    marks[layer] = centred
    return shift if centred else None


def note_tracing() -> bool:
    """Remembers that compiled code, which cannot mark what it fills, may fill caches with centred keys from here on."""
    TRACED.append(True)
    return True


note_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]  # run while Dynamo traces, not in the graph


def note_keys(keys: Tensor, shift: Tensor | None) -> None:
    """Marks keys themselves: up to 4.47 they go from cache to cache in a tuple, in each step of a generation."""
    if not torch.compiler.is_compiling():
        setattr(keys, MARKS, shift is not None)


def stored_keys(cache: Any, layer: int) -> Tensor | None:
    """The keys a cache holds of a layer, (B, G, S, D); None for none, though a static one may hold zeros alone."""
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    if layers is None:  # up to 4.53
        layers = getattr(cache, "key_cache", [])
    found: Any = layers[layer] if layer < len(layers) else None
    quantised = getattr(found, "_quantized_keys", None)
    keys = getattr(found, "keys", found) if quantised is None else found._dequantize(quantised)
    is_there = isinstance(keys, Tensor) and keys.dim() == 4 and keys.numel() > 0 and not keys.is_meta
    return keys if is_there else None  # on the meta device 4.49 makes its static ones


def is_emptied(cache: Any, layer: int, look: bool) -> bool:
    """Whether a marked cache holds no keys of a layer any more. look: at the numbers too, which waits for the GPU."""
    keys = stored_keys(cache, layer)
    return keys is None or (look and not bool(keys.any()))


def holds_centred(attention: Any, cache: Any, marks: dict[int, bool], marks_last: bool) -> bool:
    """Whether new keys of a layer are to be centred in a cache that has no mark for it: as the old ones, if any, are.

    What is found out holds for all layers, and is found out once. Raises ForeignCacheError where it cannot be.
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
    """Whether the keys in a cache look centred; True for none at all, False where it makes no difference."""
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
    """The sums over the layers of a cache that `compare` returns for one; zeros for no keys. It waits for the GPU once.

    The first over the second is about 0 for centred keys and 1 for a stock model's.
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
    """<k - (b - c), c>, <c, c> and the mean square length of the keys (B, G, S, D) of a layer: (3,), or zeros for none.

    Keys of zeros are the empty places of a static cache.
    """
    centre, rest = (x.to(keys.device) for x in (seen.centre, seen.rest))
    count = keys.any(-1).any(1).sum()
    mean = keys.sum((0, 2)) / count.clamp(min=1)
    sums = torch.stack(
        [((mean - rest) * centre).sum(), centre.square().sum(), keys.square().sum() / count.clamp(min=1)]
    )
    return sums * (count > 0)


def is_learned_prefix() -> bool:
    """Whether a PEFT model is being called that hands over a cache it has learned: a new one each time, and unmarked.

    The frame of the call tells, whether the fix came before PEFT or after it.
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
    """Marks a cache as holding keys of the fixed Qwen2Model `base`, or else uncentred ones, in every layer.

    Raises ForeignCacheError for what is no cache object, or a model that is not fixed.
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
