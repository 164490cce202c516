"""Stress checkpoints: random Qwen2 models that reach the magnitudes published for the real ones.

Every kind is one row of the published table (`KINDS`); kinds combine. Weights are random but well behaved:
unit embeddings, unit queries and keys, logits of standard deviation 1.5, so that a KL divergence between two
runs means something. What a kind adds is built, not found: the magnitude is the same for every seed and width.

Two constructions do all of it:

- *Spikes*: biases of k_proj and q_proj in one rotary pair of the first and the last layer.
- *Markers*: some tokens carry a marker in a residual channel of their own, sixteen times longer than the rest of
  their embedding. An RMSNorm makes it √hidden, whatever else the token says, so a neuron that reads only this
  channel has a known activation (and exactly 0 on every other token), and its down_proj column writes the
  massive value. Nothing else writes to these channels.

Runs on transformers 4.37.0 and later. All weights are exact in float16.

    python -m tests.stress --shape tiny --kind scores --kind residual --seed 0 [--check] OUT
"""

from tests.stress.measuring import peaks
from tests.stress.models import (
    KINDS,
    MARKED,
    MARKER_PERIOD,
    QWEN2_0_5B,
    QWEN2_1_5B,
    QWEN2_7B,
    QWEN2_7B_SLIM,
    ROPE_THETA,
    SHAPES,
    TINY,
    Shape,
    build,
    config,
    random_prompt,
)

__all__ = [
    "KINDS",
    "MARKED",
    "MARKER_PERIOD",
    "QWEN2_0_5B",
    "QWEN2_1_5B",
    "QWEN2_7B",
    "QWEN2_7B_SLIM",
    "ROPE_THETA",
    "SHAPES",
    "TINY",
    "Shape",
    "build",
    "config",
    "peaks",
    "random_prompt",
]
