"""Measurements that no model gave: a verification, and a scan of a large model in random numbers."""

import math
import random
from dataclasses import replace
from typing import Any

from qwen2_fp16_fix.patches.range_plan import FLOAT16_MAX
from qwen2_fp16_fix.scanning.result import ScanResult

VERIFICATION: dict[str, Any] = {
    "settings": {"tokens": 60, "window": 24},
    "rows": [
        {
            "name": f"{kind} float16 eager",
            "finite": kind == "fixed",
            "perplexity": 18.5 if kind == "fixed" else None,
            "drift": -1e-5 if kind == "fixed" else None,
            "kl_mean": 1e-6 if kind == "fixed" else None,
            "kl_max": 2e-6 if kind == "fixed" else None,
            "top1_agreement": 1.0 if kind == "fixed" else None,
            "largest_logit_difference": 0.01 if kind == "fixed" else None,
            "first_overflow": None if kind == "fixed" else "layer 0, raw scores q·k",
        }
        for kind in ("stock", "fixed")
    ],
}


def enlarged(scan: ScanResult, layers: int) -> ScanResult:
    """The scan with so many layers, all like its first, in random magnitudes and places."""
    dice = random.Random(layers)
    first = [site for site in scan.sites if site.layer == 0]
    ends = [site for site in scan.sites if site.layer is None]
    sites = []
    for layer in range(layers):
        for site in first:
            largest = 10 ** dice.uniform(0, 5)
            limit = 3.4e38 if site.stored_as == "float32" else FLOAT16_MAX
            where = site.where and replace(site.where, channel=dice.randrange(8192), position=dice.randrange(512))
            bits = round(math.log2(limit / largest), 3)
            sites.append(
                replace(site, layer=layer, largest=largest, headroom_bits=bits, where=where, bound=2 * largest)
            )
    lost = scan.quantisation
    inputs = [found for found in lost.linear_inputs if found.layer == 0]
    return replace(
        scan,
        sites=(*[site for site in ends if site.site == "embedding"], *sites, *ends[1:]),
        model={**scan.model, "layers": layers},
        quantisation=replace(
            lost,
            linear_inputs=tuple(
                replace(found, layer=layer, int8_loss=dice.uniform(1e-3, 0.3))
                for layer in range(layers)
                for found in inputs
            ),
            cache=tuple(replace(lost.cache[0], layer=layer) for layer in range(layers)),
            keep_16_bit=tuple(range(0, layers, 3)),
        ),
    )
