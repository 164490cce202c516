"""A survey as plain data: sites with their tokens and bounds, the first break, outliers and what quantisation loses."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..activations.extremes import Extremes, TokenPlace
from ..activations.sites import SCORES, SitePlace, execution_order
from ..patches.architecture import QWEN2
from ..patches.range_plan import FLOAT16_MAX, LIMIT
from .measurements import LINEAR_INPUTS, FirstBreak, Survey
from .prompts import Readable
from .quantisation import LOSS_LIMIT

LISTED = 32  # massive channels and spikes at most, the largest first
SMALLEST = 2.0**-149  # stands for a magnitude of 0 in headroom
#: A site to the bound that certify gives it, and to the exponent that a fixed layer stores it with.
BOUNDS = {site.name: site.bound for site in QWEN2.watched_sites() if site.bound}
EXPONENTS = {site.name: site.exponent for site in QWEN2.watched_sites() if site.exponent}


def findings(
    survey: Survey,
    first: FirstBreak | None,
    spikes: list[dict[str, Any]],
    read: Readable,
    fixed: bool,
    attention: str,
    certificate: dict[str, Any],
) -> dict[str, Any]:
    """What was measured, fit for JSON. first: where stock float16 broke; None for a fixed model."""
    sites = []
    for place in sorted(survey.sites, key=execution_order):
        stored = stored_as(place, survey.sites[place], fixed, attention)
        site = site_found(place, survey.sites[place], stored, read)
        sites.append(site | {"bound": bound_of(place, certificate, fixed)})
    broken = first_nonfinite(survey, first, sites, read)
    spikes = sorted(spikes, key=lambda spike: -abs(spike["bias"]))
    return {
        "model": certificate["config"],
        "prompts": [prompt_found(read, index) for index in range(len(read.ids))],
        "sites": sites,
        "first_nonfinite": broken,
        "finite": broken is None,
        "massive_activations": massive_found(survey, read),
        "bias_spikes": [spike_found(spike) for spike in spikes[:LISTED]],
        "bias_spikes_found": len(spikes),
        "quantisation": quantisation_found(survey),
        "certificate": {key: certificate[key] for key in ("proven", "verdict", "scaled_layers", "max_exponent")},
    }


def stored_as(place: SitePlace, extremes: Extremes, fixed: bool, attention: str) -> str | None:
    """The type a site's numbers are kept in; stock's are measured in fp32, but kept in float16."""
    if place.site in SCORES.values() and (attention != "eager" or (fixed and place.site == SCORES["raw"])):
        return None
    return str(extremes.dtype).removeprefix("torch.") if fixed else "float16"


def site_found(place: SitePlace, extremes: Extremes, stored: str | None, read: Readable) -> dict[str, Any]:
    """One site."""
    limit = FLOAT16_MAX if stored == "float16" else torch.finfo(torch.float32).max
    bits = math.log2(limit) - math.log2(max(extremes.largest, SMALLEST)) if extremes.finite else None
    return {
        "layer": place.layer,
        "site": place.site,
        "largest": finite(extremes.largest),
        "stored_as": stored,
        "headroom_bits": None if bits is None else round(bits, 3),
        "subnormal_share": extremes.subnormal_share,
        **({} if extremes.spot is None else spot_found(extremes.spot, read)),
    }


def spot_found(spot: TokenPlace, read: Readable) -> dict[str, Any]:
    """Where a number was, with the tokens there."""
    token_id, token = read.token(spot.prompt, spot.position)
    found = {"prompt": spot.prompt, "position": spot.position, "token_id": token_id, "token": token}
    found |= {"channel": spot.channel}
    if spot.key_position is not None:
        key_id, key = read.token(spot.prompt, spot.key_position)
        found |= {"head": spot.head, "key_position": spot.key_position, "key_token_id": key_id, "key_token": key}
    return found


def finite(number: float) -> float | None:
    """The number, or None, as JSON knows no other."""
    return number if math.isfinite(number) else None


def all_finite(numbers: dict[str, float]) -> dict[str, float] | None:
    """The numbers, or None where one of them is not finite."""
    return numbers if all(math.isfinite(number) for number in numbers.values()) else None


def bound_of(place: SitePlace, certificate: dict[str, Any], fixed: bool) -> float | None:
    """What certify proves of a site for any prompt, as the site is stored. None where it proves nothing."""
    if place.layer is None:
        return certificate["logits"] if place.site == "logits" else None
    layer = certificate["layers"][place.layer]
    if place.site in BOUNDS:
        bound = layer["bounds"].get(BOUNDS[place.site])
        exponent = layer["exponents"].get(EXPONENTS.get(place.site, ""), 0) if fixed else 0
        return None if bound is None else float(bound * 2.0**-exponent)
    stock = layer["stock_headroom_bits"]
    if place.site in SCORES.values() and stock.get("scores") is not None:
        scaling = certificate["config"]["head_dim"] ** -0.5 if place.site == SCORES["scaled"] else 1.0
        return float(LIMIT * 2.0 ** -stock["scores"] * scaling)
    if place.site.startswith("residual") and stock.get("residual") is not None:
        return float(FLOAT16_MAX * 2.0 ** -stock["residual"])
    return None


def first_nonfinite(
    survey: Survey, first: FirstBreak | None, sites: Sequence[dict[str, Any]], read: Readable
) -> dict[str, Any] | None:
    """The first site that is not finite, and how large its largest number is in fp32. None where all are finite.

    The number named is the largest of the site if that passes 65504, else the first that float16 lost.
    """
    place = survey.first_break() if first is None else first.found
    if place is None:
        return None
    site = next((site for site in sites if (site["layer"], site["site"]) == place), None)
    if site is not None and site["largest"] is not None and site["largest"] > FLOAT16_MAX:
        found = {key: value for key, value in site.items() if key not in ("headroom_bits", "subnormal_share", "bound")}
        return found | {"exact": True}
    extremes = survey.sites.get(place)
    spot = extremes.spot if first is None and extremes is not None else None if first is None else first.spot
    where = {} if spot is None else spot_found(spot, read)
    return {"layer": place.layer, "site": place.site, "largest": None, "stored_as": "float16", **where, "exact": False}


def prompt_found(read: Readable, index: int) -> dict[str, Any]:
    """A prompt: its text, if it was one, and how many tokens were read."""
    asked = read.asked[index]
    return {"text": asked if isinstance(asked, str) else None, "tokens": read.ids[index].shape[1]}


def spike_found(spike: dict[str, Any]) -> dict[str, Any]:
    """A spike of a bias, which a checkpoint in a wider type may have past float16's range."""
    return spike | {key: None if spike[key] is None else finite(spike[key]) for key in ("bias", "times_median")}


def massive_found(survey: Survey, read: Readable) -> list[dict[str, Any]]:
    """The channels of the residual stream with massive activations, the largest first."""
    found = []
    for channel, massive in sorted(survey.massive.channels.items(), key=lambda item: -item[1].magnitude):
        spot = spot_found(TokenPlace(massive.prompt, massive.position, channel), read)
        found.append(
            {"magnitude": finite(massive.magnitude), "layer": massive.layer, **spot, "layers": sorted(massive.layers)}
        )
    return found[:LISTED]


def quantisation_found(survey: Survey) -> dict[str, Any]:
    """What int8 would lose in linears' inputs, int8 and int4 in the cache, and the layers better left alone."""
    linears: list[dict[str, Any]] = [
        {
            "layer": place.layer,
            "site": place.site,
            "feeds": LINEAR_INPUTS[place.site],
            "outlier_ratio": finite(loss.outlier_ratio),
            "int8_loss": finite(loss.median),
        }
        for place, loss in sorted(survey.input_losses.items(), key=lambda item: execution_order(item[0]))
    ]
    cache = [
        {
            "layer": layer,
            "keys": None if losses.keys is None else all_finite(losses.keys),
            "score_error": None if losses.score_error is None else all_finite(losses.score_error),
            "values": all_finite(losses.values),
        }
        for layer, losses in sorted(survey.cache_losses.items())
    ]
    lossy = (found for found in linears if found["int8_loss"] is None or found["int8_loss"] > LOSS_LIMIT)
    keep = sorted({found["layer"] for found in lossy})
    return {"loss_limit": LOSS_LIMIT, "linear_inputs": linears, "cache": cache, "keep_16_bit": keep}
