"""The arithmetic of a verification against plain formulas."""

import math
from pathlib import Path

import pytest
import torch

import qwen2_fp16_fix
from qwen2_fp16_fix.verification import divergence
from qwen2_fp16_fix.verification.divergence import Divergence, OracleLogits, sliding_windows
from tests.helpers import kl_to
from tests.stress import TINY


@pytest.mark.parametrize(("tokens", "length", "stride"), [(2, 8, 4), (8, 8, 4), (9, 8, 7), (100, 16, 5), (101, 16, 1)])
def test_every_token_but_the_first_is_scored_once_with_all_its_context(tokens: int, length: int, stride: int) -> None:
    scored: list[int] = []
    for window in sliding_windows(tokens, length, stride):
        scored += range(window.first, window.end)
        ahead = range(window.start, window.end)[window.predictions]
        assert [place + 1 for place in ahead] == list(range(window.first, window.end))
        assert window.end - window.start <= length
        assert window.first - window.start >= (1 if window.start == 0 else length - stride)
    assert scored == list(range(1, tokens))


def test_sums_are_the_direct_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of three tokens, so that no piece is lost or counted twice."""
    monkeypatch.setattr(divergence, "COMPARED", 3 * TINY.vocab)
    torch.manual_seed(0)
    oracle, targets = 8 * torch.randn(10, TINY.vocab), torch.randint(TINY.vocab, (10,))
    logits = (oracle + torch.randn(10, TINY.vocab)).half()
    found = Divergence()
    for part in (slice(0, 4), slice(4, 10)):
        found.add(logits[part], oracle[part], targets[part])
    summary = found.summary()
    assert summary["kl_mean"] == pytest.approx(kl_to(oracle, logits), rel=1e-12)
    assert summary["kl_max"] == pytest.approx(max(map(kl_to, oracle, logits)), rel=1e-12)
    loss = torch.nn.functional.cross_entropy(logits.double(), targets)
    assert summary["perplexity"] == pytest.approx(math.exp(loss), rel=1e-12)
    assert summary["top1_agreement"] == float((oracle.argmax(-1) == logits.argmax(-1)).double().mean()) < 1
    assert summary["largest_logit_difference"] == float((oracle.double() - logits.double()).abs().max())


def test_a_perplexity_past_fp64_is_none() -> None:
    """Finite logits of 60,000 for another token: exp of the loss does not exist, and is no traceback."""
    found = Divergence()
    logits = torch.tensor([[60000.0, -60000.0]])
    found.add(logits, logits, torch.tensor([1]))
    assert found.perplexity() is None


def test_a_disk_too_small_for_the_logits_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(qwen2_fp16_fix.VerificationError, match="lower the number of tokens, or set TMPDIR"):
        OracleLogits(tmp_path, 10**18)
    store = OracleLogits(tmp_path, 20)
    whole = torch.randn(100, 20)
    store.put(0, whole[3:4])
    assert torch.equal(store.get(0), whole[3:4])
    assert (tmp_path / "0.pt").stat().st_size < whole.numel() * 4  # not what the slice was cut from
