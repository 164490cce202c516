"""Whose keys a cache without marks holds: this model's or a stock model's. The keys themselves tell.

A cache that is rebuilt from its tensors, read from a disk or mapped over has no marks (caches.py). A centre c takes the
bias out of the keys, which all of them have in common. With k the mean key of a layer and b - c the part of its bias
that centring leaves, <k - (b - c), c> / <c, c> is 0 for centred keys and 1 for a stock model's. The projected tokens
have something in common as well, which disturbs the measure less the longer c is. So the sum over the layers follows
those with a long c: it is 0.00 and 1.00 for the published spikes.

Keys are rotated, so only pairs that hardly turn within the first tokens count.
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cached_keys import is_blank, stored_keys
from .errors import ForeignCacheError

TOKENS = 256  # the first tokens of a row, whose keys are averaged
TURN = 0.5  # the most that a pair may turn within them, in radians
#: How near 0 or 1 the measure has to be for a decision.
NEAR = 0.25
#: The least <c, c>, relative to the mean square of the keys, for a decision. Along a shorter centre tokens have as much
#: in common by chance; the measure has been between -2 and 20 there.
LONG = 2.0**-4
#: A centre that is shorter than this, relative to the keys, is below half a float16 step of them and does not matter.
SHORT = 2.0**-11

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


def note_tracing() -> bool:
    """Remembers that compiled code may fill caches with centred keys from now on; it cannot mark them."""
    TRACED.append(True)
    return True


note_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]  # run while Dynamo traces, not in the graph


def look_ours(cache: Any, witnesses: tuple[Witness, ...], marks_last: bool, differs: bool) -> bool:
    """Whether the keys in a cache without marks look like this model's, and not like a stock model's.

    differs: whether this model stores more than the centre in another way than stock: exponents, pairs in two parts. If
    not, and its centre is too short to matter, both are alike.
    """
    along, centre, size = measure(cache, witnesses)
    if size == 0 and (not differs or is_blank(cache)):
        return True
    if centre <= size * SHORT**2 and not differs:
        return False
    is_told = size > 0 and centre >= size * LONG
    if is_told and abs(along - centre) <= NEAR * centre:
        return False
    if not marks_last or (TRACED and (not is_told or abs(along) <= NEAR * centre)):
        return True
    raise ForeignCacheError(
        "this cache holds keys without a mark that says whether they are centred, and they do not look like a stock "
        "model's. If a model with this fix and these weights filled it, call "
        "qwen2_fp16_fix.adopt_cache(cache, model). If they were learned or come from a stock model, call "
        "qwen2_fp16_fix.adopt_cache(cache, model, centred=False). Otherwise run the prompt again with a new cache."
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

    The frames of the call stack tell this, no matter whether the model was fixed before or after PEFT wrapped it.
    """
    frame = sys._getframe() if "peft" in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__") == "peft.peft_model":
            chosen = getattr(frame.f_locals.get("self"), "active_peft_config", None)
            if getattr(chosen, "peft_type", None) in LEARNED:
                return True
        frame = frame.f_back
    return False
