"""Turns measurements into a result: sites with tokens and bounds, the first break, outliers, losses of quantisation."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..activations.extremes import Break, Extremes, TokenPlace
from ..activations.sites import SCORES, SitePlace, execution_order
from ..certification.result import Certificate
from ..patches.architecture import QWEN2
from ..patches.range_plan import FLOAT16_MAX, LIMIT
from .measurements import LINEAR_INPUTS, Measurements
from .prompts import TokenisedPrompts
from .quantisation import LOSS_LIMIT
from .result import (
    BiasSpike,
    CacheLosses,
    FirstNonfinite,
    LinearInput,
    Losses,
    MassiveActivation,
    MeasuredSite,
    Proof,
    Quantisation,
    ScannedPrompt,
    Where,
)

LISTED = 32  # massive channels and spikes at most, the largest first
SMALLEST = 2.0**-149  # stands for a magnitude of 0 in headroom
#: A site to the bound that certify gives what is seen there, and to the exponent of a fixed layer if that scales it.
BOUNDS = {site.name: site.seen_bound for site in QWEN2.watched_sites() if site.seen_bound}
EXPONENTS = {site.name: site.exponent for site in QWEN2.watched_sites() if site.exponent and site.seen_scaled}


class Findings(NamedTuple):
    """The measurements of one run through a model, with the prompts and settings that explain them.

    broken: where the model broke first, or None. fixed, attention: how it ran.
    """

    measured: Measurements
    broken: Break | None
    spikes: list[BiasSpike]
    read: TokenisedPrompts
    fixed: bool
    attention: str

    def fields(self, certificate: Certificate) -> dict[str, Any]:
        """The fields of a ScanResult that come from measuring. certificate: of the same model."""
        sites = tuple(self.sites(certificate))
        first = self.first_nonfinite(sites)
        spikes = sorted(self.spikes, key=lambda spike: -abs(spike.bias or 0.0))
        return {
            "model": certificate.config,
            "prompts": tuple(scanned_prompts(self.read)),
            "sites": sites,
            "first_nonfinite": first,
            "finite": first is None,
            "massive_activations": massive_activations(self.measured, self.read),
            "bias_spikes": tuple(_finite_spike(spike) for spike in spikes[:LISTED]),
            "bias_spikes_found": len(spikes),
            "quantisation": quantisation(self.measured),
            "certificate": Proof(
                certificate.proven, certificate.verdict, certificate.scaled_layers, certificate.max_exponent
            ),
        }

    def sites(self, certificate: Certificate) -> Iterator[MeasuredSite]:
        """Every site, in the order of execution."""
        for place in sorted(self.measured.sites, key=execution_order):
            extremes = self.measured.sites[place]
            stored = stored_as(place, extremes, self.fixed, self.attention)
            yield MeasuredSite(
                layer=place.layer,
                site=place.site,
                largest=finite(extremes.largest),
                stored_as=stored,
                headroom_bits=headroom_of(extremes, stored),
                subnormal_share=extremes.subnormal_share,
                where=where_of(extremes.spot, self.read),
                bound=bound_of(place, certificate, self.fixed),
            )

    def first_nonfinite(self, sites: tuple[MeasuredSite, ...]) -> FirstNonfinite | None:
        """The first site that is not finite, and how large its largest number is in fp32. None if all are finite.

        If the site's largest exceeds 65504, that number is named. Otherwise it is the first that float16 lost: its size
        is not known.
        """
        if self.broken is None:
            return None
        place, spot = self.broken
        site = next((site for site in sites if (site.layer, site.site) == place), None)
        if site is not None and site.largest is not None and site.largest > FLOAT16_MAX:
            return FirstNonfinite(site.layer, site.site, site.largest, site.stored_as, site.where, exact=True)
        return FirstNonfinite(place.layer, place.site, None, "float16", where_of(spot, self.read), exact=False)


def stored_as(place: SitePlace, extremes: Extremes, fixed: bool, attention: str) -> str | None:
    """The type a site's numbers are stored in. Stock's are measured in fp32, but stored in float16.

    Only eager attention stores scores, and a fixed model stores them after they are scaled.
    """
    if place.site in SCORES.values() and (attention != "eager" or (fixed and place.site == SCORES["raw"])):
        return None
    return str(extremes.dtype).removeprefix("torch.") if fixed else "float16"


def headroom_of(extremes: Extremes, stored: str | None) -> float | None:
    """log2 of the type's largest number over the site's; None if a number is not finite."""
    if not extremes.finite:
        return None
    limit = FLOAT16_MAX if stored == "float16" else torch.finfo(torch.float32).max
    return round(math.log2(limit) - math.log2(max(extremes.largest, SMALLEST)), 3)


def where_of(spot: TokenPlace | None, read: TokenisedPrompts) -> Where | None:
    """Where a number was, with the tokens there."""
    if spot is None:
        return None
    found = Where(spot.prompt, spot.position, *read.token(spot.prompt, spot.position), spot.channel)
    if spot.key_position is None:
        return found
    key_id, key = read.token(spot.prompt, spot.key_position)
    return replace(found, head=spot.head, key_position=spot.key_position, key_token_id=key_id, key_token=key)


def finite(number: float) -> float | None:
    """The number; None if it is not finite, which JSON cannot hold."""
    return number if math.isfinite(number) else None


def losses(numbers: Mapping[str, float] | None) -> Losses | None:
    """The numbers, or None if one of them is not finite."""
    return Losses(**numbers) if numbers is not None and all(map(math.isfinite, numbers.values())) else None


def bound_of(place: SitePlace, certificate: Certificate, fixed: bool) -> float | None:
    """The bound that certify proves for a site and any prompt, in the units it is stored in. None without a bound."""
    if place.layer is None:
        return certificate.logits if place.site == "logits" else None
    layer = certificate.layers[place.layer]
    if place.site in BOUNDS:
        bound = layer.bounds.get(BOUNDS[place.site])
        exponent = layer.exponents.get(EXPONENTS.get(place.site, ""), 0) if fixed else 0
        return None if bound is None else float(bound * 2.0**-exponent)
    scores, residual = (layer.stock_headroom_bits.get(name) for name in ("scores", "residual"))
    if place.site in SCORES.values() and scores is not None:
        scaling = certificate.config["head_dim"] ** -0.5 if place.site == SCORES["scaled"] else 1.0
        return float(LIMIT * 2.0**-scores * scaling)
    if place.site.startswith("residual") and residual is not None:
        return float(FLOAT16_MAX * 2.0**-residual)
    return None


def scanned_prompts(read: TokenisedPrompts) -> Iterator[ScannedPrompt]:
    """Each prompt: its text, if it was one, and how many tokens were read."""
    for asked, ids in zip(read.asked, read.ids, strict=True):
        yield ScannedPrompt(asked if isinstance(asked, str) else None, ids.shape[1])


def _finite_spike(spike: BiasSpike) -> BiasSpike:
    """A checkpoint in a wider type may have a bias beyond float16's range: its infinity becomes None."""
    times = None if spike.times_median is None else finite(spike.times_median)
    return replace(spike, bias=None if spike.bias is None else finite(spike.bias), times_median=times)


def massive_activations(measured: Measurements, read: TokenisedPrompts) -> tuple[MassiveActivation, ...]:
    """The channels of the residual stream with massive activations, the largest first."""
    found = []
    for channel, massive in sorted(measured.massive.channels.items(), key=lambda item: -item[1].magnitude):
        where = where_of(TokenPlace(massive.prompt, massive.position, channel), read)
        assert where is not None
        found.append(MassiveActivation(finite(massive.magnitude), massive.layer, where, tuple(sorted(massive.layers))))
    return tuple(found[:LISTED])


def quantisation(measured: Measurements) -> Quantisation:
    """The losses of int8 in linears' inputs, of int8 and int4 in the cache, and the layers better left in 16 bit."""
    linears = tuple(
        LinearInput(
            layer=place.layer or 0,
            site=place.site,
            feeds=LINEAR_INPUTS[place.site],
            outlier_ratio=finite(loss.outlier_ratio),
            int8_loss=finite(loss.median),
        )
        for place, loss in sorted(measured.input_losses.items(), key=lambda item: execution_order(item[0]))
    )
    cache = tuple(
        CacheLosses(layer, losses(found.keys), losses(found.score_error), losses(found.values))
        for layer, found in sorted(measured.cache_losses.items())
    )
    lossy = (found.layer for found in linears if found.int8_loss is None or found.int8_loss > LOSS_LIMIT)
    return Quantisation(LOSS_LIMIT, linears, cache, tuple(sorted(set(lossy))))
