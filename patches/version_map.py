"""Which module of this folder serves which transformers releases, and in what these differ.

The matrix and the READMEs read RANGES too. tests/conformance holds DIFFERENCES against the source that is installed.
"""

from typing import NamedTuple

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from .errors import UnsupportedTransformersError


class Range(NamedTuple):
    """Releases that one module serves, as a requirement string."""

    requirement: str
    module: str


RANGES = (
    Range(">=4.37.0,<4.45", "v4_37"),
    Range(">=4.45,<4.48", "v4_45"),
    Range(">=4.48,<4.53", "v4_48"),
    Range(">=4.53,<4.56", "v4_53"),
    Range(">=4.56,<5.4", "v4_56"),
    Range(">=5.4,<5.24", "v5_4"),
    Range(">=5.24", "v5_24"),
)


class Difference(NamedTuple):
    """How the attention of a range is called and what it calls, as stock's source has it."""

    cache_argument: str
    update_takes: str  # beside keys, values and layer: "rotation" (cos, sin and positions), "nothing" or "kwargs"
    rotation: str  # "layer": the layer's tables; "model": what the model passes; "model or layer": either
    backends: str  # "classes": one for each; "table": functions by name, with eager for sdpa's weights or without
    window: str | None  # of a fused kernel: "computed" in the forward, "attribute" of the layer; None: in flash alone


#: By module of RANGES.
DIFFERENCES: dict[str, Difference] = {
    "v4_37": Difference("past_key_value", "rotation", "layer", "classes", None),
    "v4_45": Difference("past_key_value", "rotation", "model or layer", "classes", None),
    "v4_48": Difference("past_key_value", "rotation", "model", "table, eager for weights", "computed"),
    "v4_53": Difference("past_key_value", "rotation", "model", "table", "attribute"),
    "v4_56": Difference("past_key_values", "rotation", "model", "table", "attribute"),
    "v5_4": Difference("past_key_values", "nothing", "model", "table", "attribute"),
    "v5_24": Difference("cache", "kwargs", "model", "table", "attribute"),
}

#: The newest release the whole conformance suite has passed on. A newer one is used if its structure is the same.
NEWEST_TESTED = "5.24.0"

#: The same number promises the same arithmetic. Another one comes with a major release (before 1.0 a minor one) and an
#: entry in the changelog.
NUMERICS = 2

#: The releases that errors and READMEs call supported.
SUPPORTED = f"transformers 4.37.0 to {NEWEST_TESTED}"


def range_for(version: str) -> Range:
    """The range that serves `version`, by its base version: a release candidate counts as its release.

    Raises UnsupportedTransformersError where no range does.
    """
    try:
        base = Version(Version(version).base_version)
    except InvalidVersion:
        raise UnsupportedTransformersError(
            f"transformers reports {version!r}, which is not a version: install a supported one ({SUPPORTED})."
        ) from None
    for candidate in RANGES:
        if base in SpecifierSet(candidate.requirement):
            return candidate
    raise UnsupportedTransformersError(
        f"transformers {version} is installed, but {SUPPORTED} are supported: "
        f'run `pip install "transformers>={RANGES[0].requirement[2:8]}"`.'
    )


def is_untested(version: str) -> bool:
    """Whether `version` is newer than the newest release the conformance suite has passed on."""
    return Version(Version(version).base_version) > Version(NEWEST_TESTED)
