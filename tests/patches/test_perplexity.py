"""The perplexity table of transformers pull request 33317, in kind, on the demo checkpoint.

Published for Qwen2-7B there: stock float16 eager NaN, stock bf16 eager 7.9967 against 7.1330 in sdpa.

The passage is drawn from the fp32 model itself. On such text the expected difference of the two losses is exactly
KL(oracle || model), a mean over every word that could have come next. The measured difference has chance in it, too:
rounding moves the loss of one token by 1.7e-3 (standard deviation), up or down, whatever the fix does.
"""

import math
import statistics
from functools import cache
from typing import Any

import pytest
import torch
import transformers

import qwen2_fp16_fix
from qwen2_fp16_fix import demo
from tests.helpers import kl_to
from tools.train_demo import healthy, scores_only

pytestmark = pytest.mark.xdist_group("perplexity")  # one worker draws the passage, for all

WINDOWS, LENGTH = 32, 256
CHANCE = 4 * 1.7e-3 / math.sqrt(WINDOWS * LENGTH)  # four standard deviations of the mean loss


@cache
def weights() -> Any:
    """The demo's weights with the spiked scores alone, in fp32: the disease the published table is about."""
    return scores_only(demo.load(demo.CHECKPOINT, False, torch.float32, "sdpa"))


@cache
def passage() -> torch.Tensor:
    """Text (1, 8192) drawn from the fp32 model, in windows that each start with a line break."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.CHECKPOINT)
    start = torch.tensor([tokenizer.encode("\n")]).expand(WINDOWS, -1)
    torch.manual_seed(0)
    with demo.quiet():
        drawn = weights().generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            cache_implementation="static",  # half of the time went into making room for a key more
            top_k=0,
            min_new_tokens=LENGTH - 1,
            max_new_tokens=LENGTH - 1,
            pad_token_id=0,
        )
    return drawn.reshape(1, -1)


@cache
def copied(dtype: torch.dtype, attention: str, fixed: bool) -> Any:
    """A copy of the weights' model."""
    model = type(weights())(weights().config)
    model.load_state_dict(weights().state_dict())
    model.set_attn_implementation(attention)
    model = model.to(dtype).eval()
    return qwen2_fp16_fix.fix(model) if fixed else model


@cache
def perplexity(dtype: torch.dtype, attention: str, fixed: bool, tokens: int = WINDOWS * LENGTH) -> float:
    """Of the passage's first tokens."""
    return demo.perplexity_of(copied(dtype, attention, fixed), passage()[:, :tokens])


def kl(dtype: torch.dtype, attention: str, fixed: bool) -> float:
    """The mean KL divergence of the passage's next tokens to fp32's: what the log of the perplexity grows by."""
    pairs = zip(logits(torch.float32, "eager", False), logits(dtype, attention, fixed), strict=True)
    return statistics.fmean(kl_to(*pair) for pair in pairs)


@cache
def logits(dtype: torch.dtype, attention: str, fixed: bool) -> list[torch.Tensor]:
    """Of the passage, in parts of four windows."""
    model = copied(dtype, attention, fixed)
    return [model(input_ids=part).logits for part in passage().reshape(-1, 4, LENGTH)]


HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def test_stock_float16_eager_is_nan() -> None:
    assert math.isnan(perplexity(HALF, "eager", fixed=False, tokens=LENGTH))


def test_stock_bfloat16_eager_is_visibly_worse_than_sdpa() -> None:
    """Published: 12 % on 7B. Here it is more than twice, for which some windows of the passage are enough."""
    eager, sdpa = (perplexity(BF16, attention, fixed=False, tokens=16 * LENGTH) for attention in ("eager", "sdpa"))
    assert eager > 1.1 * sdpa


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "attention", "growth"), [(HALF, "eager", 1e-5), (HALF, "sdpa", 1e-5), (BF16, "eager", 1e-3)]
)
def test_fixed_perplexity_is_fp32s(dtype: torch.dtype, attention: str, growth: float) -> None:
    """float16 keeps the perplexity within 1e-5, bfloat16, which rounds the MLP to 8 bits, within 1e-3."""
    assert 0 <= kl(dtype, attention, fixed=True) < growth
    oracle = perplexity(FP32, "eager", fixed=False)
    chance = CHANCE if dtype is HALF else 0  # below what bfloat16 may grow by
    assert perplexity(dtype, attention, fixed=True) == pytest.approx(oracle, rel=growth + chance)


def test_the_disease_leaves_fp32_alone() -> None:
    """The healthy twin has the same perplexity within 0.1 %: what is added is range, not another model."""
    twin = healthy(demo.load(demo.CHECKPOINT, False, torch.float32, "sdpa"))
    ill = demo.load(demo.CHECKPOINT, False, torch.float32, "sdpa")
    part = passage()[:, :8192]
    assert demo.perplexity_of(ill, part) == pytest.approx(demo.perplexity_of(twin, part), rel=1e-3)
