"""The arithmetic of patches/numerics.py against fp64, one upcast at a time."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.cost import cost_of
from qwen2_fp16_fix.patches import autocast, numerics

HALF = torch.float16


def random(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = HALF) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@pytest.fixture(params=["cpu", "elsewhere"])
def device_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms that depend on the device, computed here."""
    monkeypatch.setattr(numerics, "runs_on_cpu", lambda tensor: request.param == "cpu")
    return str(request.param)


def test_promote_residual_widens_float16_alone() -> None:
    """A residual left in float16 passes 65504; one of another dtype must not change."""
    assert numerics.promote_residual(random(2)).dtype == torch.float32
    assert numerics.promote_residual(random(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert numerics.promote_residual(random(2, dtype=torch.float32)).dtype == torch.float32


@pytest.fixture(params=["cpu", "in parts", "fused", "autograd"])
def norm_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each form of the norm: on a CPU, on a GPU without and with torch's kernel, and with all results kept."""
    monkeypatch.setattr(numerics, "runs_on_cpu", lambda tensor: request.param == "cpu")
    monkeypatch.setattr(numerics, "has_fused_norm", lambda device_type: request.param == "fused")
    with torch.set_grad_enabled(request.param == "autograd"):
        yield str(request.param)


@pytest.mark.usefixtures("norm_kind")
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_rms_norm_rounds_once(dtype: torch.dtype) -> None:
    """Stock rounds after normalising and again after the gain: one float16 in four then differs from the nearest."""
    hidden, gain = random(64, 256, dtype=dtype), random(256, seed=1)
    before = hidden.clone()
    exact = gain.double() * hidden.double() * torch.rsqrt(hidden.double().pow(2).mean(-1, keepdim=True) + 1e-6)
    got = numerics.rms_norm(hidden, gain, 1e-6, HALF)
    wrong = (got != exact.to(HALF)).double().mean()
    assert (
        wrong < 1e-3
    )  # fp32 arithmetic lands on the other side of a tie about once in 2^13; rounding twice, once in 4
    assert got.dtype == HALF
    assert torch.equal(hidden, before)  # the residual stream, which the layer goes on with


@pytest.mark.usefixtures("norm_kind")
def test_rms_norm_takes_what_float16_cannot_hold() -> None:
    """The length of eight times 30,000 is 84,853: a norm without its upcast returns zeros."""
    got = numerics.rms_norm(torch.full((1, 8), 30000.0, dtype=HALF), torch.ones(8, dtype=HALF), 1e-6, HALF)
    assert torch.equal(got, torch.ones(1, 8, dtype=HALF))


@pytest.mark.usefixtures("norm_kind")
def test_rms_norm_adds_its_epsilon() -> None:
    """Of a token of zeros, or nearly so, it is what counts; each epsilon is another constant."""
    hidden, gain = torch.full((1, 8), 1e-3), torch.ones(8, dtype=HALF)
    for eps in (1e-6, 3e-6):
        got = numerics.rms_norm(hidden, gain, eps, torch.float32)
        torch.testing.assert_close(got, torch.full((1, 8), 1e-3 / math.sqrt(1e-6 + eps)))  # an fp32 step or two
    assert not numerics.rms_norm(hidden * 0, gain, 1e-6, HALF).any()


def test_rms_norm_in_parts_is_five_kernels() -> None:
    """F.rms_norm in parts is six, eight with its casts. With a kernel of its own it is one, three with its casts."""
    hidden, gain = random(4, 256, dtype=torch.float32), random(256, seed=1)

    def norm() -> Tensor:
        return numerics.rms_norm(hidden, gain, 1e-6, HALF)

    parts = cost_of(norm, fused_norm=False)
    assert [launch.name for launch in parts.launches] == ["linalg_vector_norm", "addcmul", "rsqrt_", "mul", "mul"]
    assert parts.kernels == 5
    assert cost_of(norm).kernels == 3


def test_a_fused_norm_is_taken_where_the_dispatcher_has_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.8 has the operator and no kernel for it: F.rms_norm then runs in parts, more of them than ours."""
    assert not numerics.has_fused_norm("cpu")  # true of all releases up to 2.13, all of which have F.rms_norm
    assert not numerics.has_fused_norm("no such device")
    assert not numerics._has_kernel("aten::no_such_operator", "CPU")
    assert numerics._has_kernel("aten::mm", "CPU")
    asked = []
    monkeypatch.setattr(numerics, "_has_kernel", lambda *names: asked.append(names) or True)
    assert numerics.has_fused_norm("cuda")
    assert asked == [("aten::_fused_rms_norm", "CUDA")]


def test_a_norm_in_fake_mode_keeps_no_fake_constant() -> None:
    """A tool that plans memory runs the model on fake tensors; the constant kept of that would break the next run."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        fake = numerics.rms_norm(torch.ones(2, 8), torch.ones(8, dtype=HALF), 5e-6, HALF)
    assert fake.shape == (2, 8)
    with torch.no_grad():
        assert torch.isfinite(numerics.rms_norm(torch.ones(2, 8), torch.ones(8, dtype=HALF), 5e-6, HALF)).all()


def test_rotate_rounds_once() -> None:
    """A key of 160 has a float16 step of 0.125: every further rounding in between costs as much again."""
    states = random(1, 2, 32, 16, scale=100.0)
    angle = torch.arange(32.0)[:, None] * torch.logspace(0, -3, 8)
    cos, sin = (f(torch.cat((angle, angle), -1))[None] for f in (torch.cos, torch.sin))
    first, second = states.double().chunk(2, -1)
    exact = states.double() * cos.double() + torch.cat((-second, first), -1) * sin.double()
    wrong = (numerics.rotate(states, cos, sin).to(HALF) != exact.to(HALF)).double().mean()
    assert wrong < 1e-3  # ties decided by fp32, as above


def test_rotate_computes_in_fp32_with_half_tables() -> None:
    """A caller that hands down float16 tables still gets an fp32 rotation, rounded once."""
    states = random(1, 2, 32, 16, scale=100.0)
    cos, sin = random(1, 32, 16, seed=1), random(1, 32, 16, seed=2)
    exact = numerics.rotate(states.double(), cos.double(), sin.double())  # float() inside: fp32 is exact enough here
    assert torch.equal(numerics.rotate(states, cos, sin).to(HALF), exact.to(HALF))


def reference(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention in fp64 with keys repeated, masked with -inf."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(repeats, 1) for x in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scaling
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    weights = scores.softmax(-1)
    return weights @ value, weights


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("queries", [1, 5])
def test_grouped_attention_is_attention(heads: tuple[int, int], queries: int, device_kind: str) -> None:
    """Grouping query heads by key head must not mix them up."""
    query, key, value = (
        random(2, h, n, 16, seed=i) for i, (h, n) in enumerate([(heads[0], queries), (heads[1], 7), (heads[1], 7)])
    )
    allowed = torch.ones(queries, 7, dtype=torch.bool).tril(7 - queries)[None, None]
    output, weights = numerics.grouped_attention(query, key, value, numerics.widen_mask(allowed, 7), 0.25)
    expected, expected_weights = reference(query, key, value, allowed, 0.25)
    assert weights.dtype == HALF
    assert output.dtype == (torch.float32 if device_kind == "cpu" else HALF)
    torch.testing.assert_close(weights.double(), expected_weights, atol=5e-4, rtol=0)  # half a float16 step below 1
    torch.testing.assert_close(output.double(), expected, atol=4e-3, rtol=0)  # float16 weights times values up to 4


def test_sdpa_operands_have_one_dtype_and_a_safe_mask(device_kind: str) -> None:
    """One dtype for all, and a mask in it that float16 scores or towering ones in fp32 cannot pass."""
    query, key, value = random(1, 4, 2, 8).float(), random(1, 2, 5, 8), random(1, 2, 5, 8)
    additive = torch.zeros(1, 1, 2, 6, dtype=HALF).index_fill_(-1, torch.tensor([4]), torch.finfo(HALF).min)
    wanted = torch.float32 if device_kind == "cpu" else HALF
    *operands, mask = numerics.sdpa_operands(query, key, value, additive)
    assert {operand.dtype for operand in operands} == {wanted}
    if device_kind != "cpu":
        assert operands[0].transpose(1, 2).is_contiguous()  # kernels that return this order spare the output a copy
    assert mask is not None
    assert mask.shape[-1] == 5
    assert mask[0, 0, 0, 4] <= torch.finfo(wanted).min
    allowed = torch.ones(1, 1, 2, 5, dtype=torch.bool)
    assert torch.equal(numerics.sdpa_operands(query, key, value, allowed)[3], allowed)
    assert numerics.sdpa_operands(query, key, value, None)[3] is None


def test_sdpa_operands_are_left_to_autocast() -> None:
    """It would cast fp32 operands back, and turn an fp32 minimum into -inf: NaN in a row with every key masked."""
    operands = random(1, 4, 2, 8).float(), random(1, 2, 5, 8), random(1, 2, 5, 8)
    with torch.autocast("cpu", dtype=HALF):
        found = numerics.sdpa_operands(*operands, None)
    assert {tensor.dtype for tensor in found[:3] if tensor is not None} == {HALF}


def test_scores_become_weights_in_place_unless_autograd_wants_them() -> None:
    """Two copies of the scores are what runs out of memory in a long prompt."""
    scores = torch.randn(2, 5)
    expected = scores.softmax(-1)
    assert numerics.softmax(scores).data_ptr() == scores.data_ptr()
    assert torch.equal(scores, expected)
    wanted = torch.randn(2, 5, requires_grad=True)
    numerics.softmax(wanted).sum().backward()
    assert wanted.grad is not None


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize("autocast", [False, True])
def test_scores_of_300_times_300_are_exact(autocast: bool) -> None:
    """300 · 300 = 90,000 is inf in float16; autocast would cast the fp32 operands of the product back."""
    query, key, value = (torch.zeros(1, 2, 3, 8, dtype=HALF) for _ in range(3))
    query[..., 0] = key[..., 0] = 300.0
    key[..., 1], query[..., 1] = torch.arange(3.0).half(), 1.0
    value[..., 0] = torch.arange(3.0).half()
    with torch.autocast("cpu", dtype=HALF, enabled=autocast):
        output, weights = numerics.grouped_attention(query, key, value, None, 1.0)
    expected = torch.tensor([90000.0, 90001.0, 90002.0]).softmax(0)
    assert torch.isfinite(output).all()
    torch.testing.assert_close(weights[0, 0, 0].float(), expected, atol=5e-4, rtol=0)  # half a float16 step below 1


def test_masked_keys_weigh_exactly_nothing_among_large_scores() -> None:
    """float16's minimum, -65504, added to a score of 90,000 leaves 24,496: more than any unmasked score near zero."""
    query, key, value = (torch.zeros(1, 1, n, 8, dtype=HALF) for n in (1, 2, 2))
    query[..., 0], key[0, 0, 1, 0] = 300.0, 300.0
    mask = torch.tensor([[[[0.0, torch.finfo(HALF).min]]]], dtype=HALF)
    _, weights = numerics.grouped_attention(query, key, value, numerics.widen_mask(mask, 2), 1.0)
    assert weights.flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("lowest", [torch.finfo(HALF).min, -torch.inf])
def test_a_row_with_every_key_masked_is_finite(lowest: float) -> None:
    """A left-padded query sees no key: with -inf its softmax is NaN, and 0 · NaN spreads to the rows beside it."""
    query, key, value = (random(1, 1, n, 8, seed=n) for n in (2, 3, 3))
    mask = torch.tensor([[[[lowest] * 3, [0.0, 0.0, lowest]]]], dtype=HALF)
    output, weights = numerics.grouped_attention(query, key, value, numerics.widen_mask(mask, 3), 1.0)
    assert torch.isfinite(output).all()
    assert weights[0, 0, 1, 2] == 0


def test_additive_masks_keep_what_is_not_a_minimum() -> None:
    """A bias of a user's own (a penalty, ALiBi) is a number to add, not a mask."""
    mask = torch.tensor([[[[0.0, -2.5, -60000.0]]]], dtype=HALF)
    assert torch.equal(numerics.widen_mask(mask, 3), mask.float())


def test_a_boolean_mask_means_allowed() -> None:
    """sdpa's convention from 4.53: True takes part."""
    mask = numerics.widen_mask(torch.tensor([[[[True, False]]]]), 2)
    assert mask.tolist() == [[[[0.0, torch.finfo(torch.float32).min]]]]


@pytest.mark.parametrize(
    "prepare", [numerics.widen_mask, numerics.mask_to_minus_inf], ids=lambda prepare: prepare.__name__
)
def test_a_mask_one_column_too_wide_is_cut(prepare: Callable[[Tensor, int], Tensor]) -> None:
    """Releases 4.42 to 4.52 hand one over when the caller gives no mask."""
    assert prepare(torch.zeros(1, 1, 2, 4, dtype=HALF), 3).shape == (1, 1, 2, 3)


def test_a_sealed_mask_holds_against_any_score() -> None:
    """float16's minimum in a fused kernel leaves 24,496 of a score of 90,000; a row of -inf alone would be NaN."""
    lowest = torch.finfo(HALF).min
    mask = torch.tensor([[[[0.0, lowest, -2.5], [lowest] * 3]]], dtype=HALF)
    assert numerics.mask_to_minus_inf(mask, 3).tolist() == [[[[0.0, -torch.inf, -2.5], [lowest] * 3]]]
    boolean = torch.tensor([[[[True, False]]]])
    assert torch.equal(numerics.mask_to_minus_inf(boolean, boolean.shape[-1]), boolean)


def test_full_precision_means_fp32_without_autocast() -> None:
    """Trainer(fp16=True) keeps fp32 weights and casts each matmul: such a model overflows: not for stock's path."""
    x = torch.zeros(1)
    assert autocast.is_full_precision(x)
    assert not autocast.is_full_precision(x.half())
    assert not autocast.is_full_precision(x.bfloat16())
    with torch.autocast("cpu", dtype=HALF):
        assert not autocast.is_full_precision(x)
