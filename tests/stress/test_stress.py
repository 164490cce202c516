"""The stress checkpoints have the magnitudes they claim; without this, tests that use them could pass idly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2ForCausalLM

from tests import stress
from tests.helpers import kl_to
from tests.stress.__main__ import main

IDS = stress.random_prompt(stress.TINY, 2, 48, seed=7)
# kind: {peak: (at least, at most)}, the published magnitude give or take what the random rest adds
CLAIMS = {
    "scores": {"scores": (75_000, 100_000), "residual": (0, 100)},
    "keys": {"scores": (2_000, 60_000), "residual": (0, 100)},
    "keys_fast": {"scores": (2_000, 60_000), "residual": (0, 100)},
    "massive": {"scores": (0, 1_000), "residual": (11_500, 12_200), "block": (11_500, 12_200)},
    "residual": {"scores": (0, 1_000), "residual": (70_000, 92_000), "block": (48_000, 52_000)},
    "swiglu": {"act_up": (4_200, 4_400), "down": (68_000, 72_000), "partial": (100_000, 130_000)},
    "moe57": {"residual": (48_000, 52_000), "down": (48_000, 52_000)},
}


@torch.no_grad()
def logits(model: Qwen2ForCausalLM, ids: Tensor = IDS) -> Tensor:
    """(batch, length, vocab) float32."""
    output: Tensor = model(input_ids=ids, use_cache=False).logits
    return output.float()


def stock(kinds: tuple[str, ...], attention: str) -> Qwen2ForCausalLM:
    """A tiny float32 model."""
    model: Qwen2ForCausalLM = stress.build(stress.TINY, kinds, attn_implementation=attention)
    return model


@pytest.mark.parametrize("kind", stress.KINDS)
def test_every_kind_has_the_magnitude_it_claims(kind: str) -> None:
    """A stress model whose peak is far below the published one proves nothing."""
    found = stress.peaks(stock((kind,), "eager"), IDS)
    for name, (low, high) in CLAIMS[kind].items():
        assert low <= found[name] <= high, (name, found)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", stress.KINDS)
def test_float32_is_finite_and_float16_fails_where_it_should(kind: str, attention: str) -> None:
    """scores break eager only, residual and swiglu break both, the other kinds break neither."""
    model = stock((kind,), attention)
    assert logits(model).isfinite().all()
    breaks = kind in ("residual", "swiglu") or (kind == "scores" and attention == "eager")
    assert bool(logits(model.half()).isfinite().all()) is not breaks


@pytest.mark.parametrize("kind", ["keys", "keys_fast"])
def test_key_kinds_lose_accuracy_without_overflow(kind: str) -> None:
    """Key rounding must show: float16 with fused scores is far worse than on the plain model."""
    plain, spiked = (_kl_of_float16(kinds) for kinds in ((), (kind,)))
    assert spiked > 10 * plain


def _kl_of_float16(kinds: tuple[str, ...]) -> float:
    model = stock(kinds, "sdpa")
    return kl_to(logits(model), logits(model.half()))


def test_kinds_combine() -> None:
    """All kinds at once keep the magnitude of each."""
    found = stress.peaks(stock(stress.KINDS, "eager"), IDS)
    assert 75_000 <= found["scores"] <= 110_000
    assert 70_000 <= found["residual"] <= 92_000
    assert 4_200 <= found["act_up"] <= 4_400
    assert 100_000 <= found["partial"] <= 130_000


@pytest.mark.parametrize("kinds", [(kind,) for kind in stress.KINDS] + [stress.KINDS])
def test_float32_predictions_differ_and_listen_to_context(kinds: tuple[str, ...]) -> None:
    """KL is only sensitive on distributions that are neither flat nor one-hot, and not deaf to the prompt."""
    model = stock(kinds, "eager")
    predicted = logits(model).log_softmax(-1)[:, 8:]
    entropy = -(predicted.exp() * predicted).sum(-1)
    assert 0.3 < entropy.mean() < 4.7  # ln 128 = 4.85
    changed = IDS.clone()
    changed[:, 5] = (changed[:, 5] + 3) % stress.TINY.vocab
    shift = (predicted - logits(model, changed).log_softmax(-1)[:, 8:]).abs().mean()
    assert shift > 1e-3


def test_weights_are_exact_in_float16() -> None:
    """Casting to float16 must lose nothing, or every comparison with float32 would measure the cast."""
    for name, tensor in stock(stress.KINDS, "eager").state_dict().items():
        assert torch.equal(tensor, tensor.half().float()), name


def test_same_seed_same_model_and_other_seed_other_model() -> None:
    """A stress failure must be reproducible from its seed."""
    first, again, other = (stress.build(stress.TINY, ("scores",), seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_unknown_kind_is_refused() -> None:
    """A misspelt kind must not build a healthy model."""
    with pytest.raises(ValueError, match="unknown kinds"):
        stress.build(stress.TINY, ("score",))


def test_command_saves_a_float16_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line builds, checks and saves in one go."""
    assert main(["--kind", "scores", "--check", str(tmp_path)]) == 0
    assert "eager NOT finite" in capsys.readouterr().out
    weights = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
