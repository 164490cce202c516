"""The rotary settings of a config: the scale of cos and sin, and the settings that no bound covers.

Releases read them in different places and by different formulas. To 4.57 that is `rope_scaling`, where `type` wins over
`rope_type`; from 5.0 on `rope_parameters`, where `rope_type` wins, unless there is a `rope_scaling` as well. So every
group of settings counts that a release may read, by every formula of every release.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import CheckpointError, quoted

#: The kinds that releases know. Another one may be a user's own, which may do anything.
KINDS = (None, "default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
#: The largest and the smallest setting for which all frequencies are known to be finite, and angles as well. Published
#: checkpoints have a theta of 1e4 to 5e7 and factors of 1 to 64.
ORDINARY = {
    "rope_theta": (2.0, 1e15),
    "factor": (1e-6, 1e6),
    "short_factor": (1e-6, 1e6),
    "long_factor": (1e-6, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "original_max_position_embeddings": (2.0, 1e12),
}
OUTSIDE = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")  # of the config itself
NUMBERS = (*ORDINARY, "partial_rotary_factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
LISTS = ("short_factor", "long_factor")  # a number for each pair of channels


def groups(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Each group of rotary settings, with those of the config itself that a release takes where the group has none.

    Releases from 5.0 on may have a group for each type of layer inside. Raises CheckpointError for what is not a group.
    """
    outer = {key: config[key] for key in OUTSIDE if key in config}
    yield outer
    for place in ("rope_scaling", "rope_parameters"):
        found = config.get(place) or {}
        if not isinstance(found, Mapping):
            raise CheckpointError(f"config.json has {place} = {quoted(found)}, which is not a group of settings.")
        yield {**outer, **found}
        yield from ({**outer, **inner} for inner in found.values() if isinstance(inner, Mapping))


def check_rotary(config: Mapping[str, Any], pairs: int | None = None) -> None:
    """Raises CheckpointError for a setting that is not a number where all releases take one. null means the default.

    pairs: of a head's channels, if known. longrope has a factor for each of them.
    """
    for group in groups(config):
        for name in LISTS if "longrope" in (group.get("rope_type"), group.get("type")) else ():
            held = group.get(name)
            if pairs is not None and isinstance(held, list) and len(held) != pairs:
                raise CheckpointError(f"config.json has {len(held)} numbers in {name} for {pairs} pairs of channels.")
        for name in NUMBERS:
            values = group.get(name)
            for value in values if name in LISTS and isinstance(values, list) else [values]:
                if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
                    raise CheckpointError(
                        f"config.json has {name} = {quoted(value)} in its rope settings, not a number."
                    )

        share = group.get("partial_rotary_factor")
        if share is not None and not 0 < share <= 1:
            raise CheckpointError(f"config.json has partial_rotary_factor = {share!r}, not a share of the channels.")


def rotation_scale(config: Mapping[str, Any]) -> float:
    """The largest magnitude by which any release multiplies cos and sin: 1, or more under yarn and longrope."""
    return max(scale for group in groups(config) for scale in scales_of(group, config))


def scales_of(group: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[float]:
    """The magnitudes that releases compute from one group. Old releases do not scale, which is 1.

    Some take the factor as it is written, others from the longest context and the original one.
    """
    yield 1.0
    kinds = (group.get("rope_type"), group.get("type"))
    if not ("yarn" in kinds or "longrope" in kinds):
        return
    if group.get("attention_factor") is not None:
        yield abs(group["attention_factor"])
        return
    longest, name = config.get("max_position_embeddings") or 32768, "original_max_position_embeddings"
    originals = {group.get(name) or longest, config.get(name) or longest, longest}
    factors = {group.get("factor") or 1.0, *(longest / original for original in originals)}
    for factor in filter(lambda factor: factor > 0, factors):
        if "yarn" in kinds:
            yield from yarn_scales(math.log(factor), group.get("mscale"), group.get("mscale_all_dim"))
        if "longrope" in kinds and factor > 1:
            yield from (math.sqrt(1 + math.log(factor) / math.log(each)) for each in originals if each > 1)


def yarn_scales(log_factor: float, mscale: float | None, mscale_all_dim: float | None) -> Iterator[float]:
    """Magnitudes of Peng et al. 2023, eq. 22, with the two settings of DeepSeek-V3, which old releases do not read."""
    yield abs(0.1 * log_factor + 1)  # old releases do so for factors below 1 as well
    if mscale and mscale_all_dim and log_factor > 0:
        part, whole = (0.1 * each * log_factor + 1 for each in (mscale, mscale_all_dim))
        scale = abs(part / whole) if whole else math.inf
        yield math.inf if math.isnan(scale) else scale


def unusual_settings(config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each setting whose frequencies may not be finite, or are not known."""
    for group in groups(config):
        for kind in (group.get("rope_type"), group.get("type")):
            if kind not in KINDS:
                yield f"its rope settings are of type {quoted(kind)}, whose rotation is not bounded here"
        for name, (least, most) in ORDINARY.items():
            values = group.get(name)
            for value in values if isinstance(values, list) else [values]:
                if value is not None and not least <= value <= most:
                    yield f"its {name} is {quoted(value)}, where rotary frequencies may not be finite in fp32"
        if group.get("partial_rotary_factor") not in (None, 1):
            share = quoted(group["partial_rotary_factor"])
            yield f"its partial_rotary_factor is {share}: Qwen2 rotates all channels, and newer releases fail with it"
        low, high = group.get("low_freq_factor"), group.get("high_freq_factor")
        if low is not None and high is not None and not low < high:
            yield f"its low_freq_factor is {low!r}, which is not below its high_freq_factor, {high!r}"
