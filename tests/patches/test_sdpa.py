"""What torch's fused attention is given: by what it is called with, since no test here has the GPU it matters on."""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import qwen2_fp16_fix
from benchmarks.workloads import CACHE
from qwen2_fp16_fix.patches import attention, attention_classes, sdpa
from tests.helpers import kl_to
from tests.stress import KINDS, TINY, build, random_prompt

PROMPT = random_prompt(TINY, batch=2, length=24)
SDPA = nn.functional.scaled_dot_product_attention
#: Keys apart: how exact they are is another matter.
STRESS = tuple(kind for kind in KINDS if not kind.startswith("keys"))
#: Two orders of the same fp32 sums over 40 keys, of outputs below 4: their step is 2.4e-7.
SUMS = 1e-6
H, G, K, D = 6, 2, 40, 16


class Calls(TorchFunctionMode):
    """The calls of torch's fused attention: what each was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], tuple[int, ...], bool]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is SDPA:
            self.seen.append((tuple(args[0].shape), tuple(args[1].shape), kwargs.get("enable_gqa", False)))
        return function(*args, **kwargs)


class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most numbers that an operator has put into new memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in args if isinstance(leaf, Tensor)}
        made = [result] if isinstance(result, Tensor) else []
        self.largest = max([self.largest, *(x.numel() for x in made if x.untyped_storage()._cdata not in given)])
        return result


def operands(queries: int = 1, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, H, queries, D), (batch, G, K, D), (batch, G, K, D))
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return query, key, value


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "boolean, of all heads": lambda: torch.rand(2, 1, 1, K) > 0.3,
    "boolean, of a batch of one": lambda: torch.rand(1, 1, 1, K) > 0.3,
    "additive, of all heads": lambda: torch.randn(2, 1, 1, K),
    "additive, of each head": lambda: torch.randn(2, H, 1, K),
    "additive, of each head, without a batch": lambda: torch.randn(H, 1, K),
    "additive, without heads": lambda: torch.randn(1, K),
}


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """In fp64, keys repeated, (B, Q, H, D)."""
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(H // G, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * 0.25
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("entry", ["by name", "before 4.48"])
def test_one_query_is_attention_with_no_shared_heads_and_nothing_repeated(entry: str, mask: Any) -> None:
    """Flash begins at 8.0 and the kernel before it takes no shared heads: torch wrote fp32 scores out instead."""
    allowed, (query, key, value) = mask(), operands()
    with Calls() as calls, Sizes() as sizes:
        if entry == "by name":
            found, weights = sdpa.sdpa_attention(nn.Module(), query, key, value, allowed, scaling=0.25)
            assert weights is None
        else:
            found = attention_classes.sdpa_attention(query, key, value, allowed, 0.25, 0.0)
    assert calls.seen == [((2, G, H // G, D), (2, G, K, D), False)]
    assert sizes.largest <= key.numel()  # the keys of all query heads would be three times as many
    assert found.shape == (2, 1, H, D)
    torch.testing.assert_close(found.double(), exact(query, key, value, allowed), atol=SUMS, rtol=0)


def test_a_key_may_be_wider_than_its_value() -> None:
    query, key, value = operands()
    found, _ = sdpa.sdpa_attention(nn.Module(), query, key, value[..., :4], None, scaling=0.25)
    torch.testing.assert_close(found.double(), exact(query, key, value, None)[..., :4], atol=SUMS, rtol=0)


class Grouped(nn.Module):
    """What transformers' function reads of an attention."""

    num_key_value_groups = H // G
    is_causal = True


@pytest.fixture(params=["shares key heads", "does not"])
def shares(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both kinds of device."""
    monkeypatch.setattr(sdpa, "shares_key_heads", lambda tensor: request.param == "shares key heads")
    return bool(request.param == "shares key heads")


@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_a_prompt_is_transformers_attention(masked: bool, is_causal: bool | None, shares: bool) -> None:
    """Keys are repeated before they are handed over where torch has no kernel for shared heads."""
    query, key, value = operands(queries=K)
    allowed = torch.rand(2, 1, K, K) > 0.3 if masked else None
    options: dict[str, Any] = {"scaling": 0.25, "is_causal": None if masked else is_causal}
    with Calls() as calls:
        found, _ = sdpa.sdpa_attention(Grouped(), query, key, value, allowed, **options)
    expected, _ = sdpa.STOCK_SDPA(Grouped(), query, key, value, allowed, **options)
    torch.testing.assert_close(found, expected, atol=SUMS, rtol=0)
    if not shares:
        assert calls.seen == [((2, H, K, D), (2, H, K, D), False)]
    causal = None if is_causal is False else torch.ones(K, K, dtype=torch.bool).tril()
    expected = exact(query, key, value, allowed if masked else causal)
    torch.testing.assert_close(found.double(), expected, atol=SUMS, rtol=0)


@pytest.mark.usefixtures("shares")
def test_an_encoders_keys_are_repeated_without_a_triangle() -> None:
    """Whoever sets `is_causal` on the modules (gte-Qwen2 does) sees both ways on older GPUs, too."""
    module, tensors = Grouped(), operands(queries=K)
    module.is_causal = False
    found, _ = sdpa.sdpa_attention(module, *tensors, None, scaling=0.25)
    torch.testing.assert_close(found.double(), exact(*tensors, None), atol=SUMS, rtol=0)


@pytest.mark.parametrize("name", ["position_bias", "softcap", "cache", "output_attentions", "head_mask"])
@pytest.mark.parametrize("queries", [1, 3])
def test_what_only_transformers_function_knows_is_left_to_it(
    name: str, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(sdpa, "STOCK_SDPA", lambda *args, **kwargs: given.append((args, kwargs)) or (args[1], None))
    monkeypatch.setattr(sdpa, "shares_key_heads", lambda tensor: False)
    module, special = Grouped(), torch.ones(2) if name == "position_bias" else True
    tensors = operands(queries=queries)
    sdpa.sdpa_attention(module, *tensors, None, scaling=0.25, **{name: special})
    ((arguments, options),) = given
    assert arguments[0] is module
    assert all(one is other for one, other in zip(arguments[1:4], tensors, strict=True))
    assert options[name] is special


CARDS = {"P100": (6, 0), "V100": (7, 0), "T4": (7, 5), "A100": (8, 0), "H100": (9, 0)}


@pytest.mark.parametrize("card", CARDS)
def test_key_heads_are_shared_from_ampere_on(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "device_of", lambda tensor: "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: CARDS[card])
    assert sdpa.shares_key_heads(torch.ones(1)) == (card in ("A100", "H100"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert sdpa.shares_key_heads(torch.ones(1))


def test_other_devices_are_not_asked() -> None:
    assert sdpa.shares_key_heads(torch.ones(1))
    assert sdpa.shares_key_heads(torch.ones(1, device="meta"))


# --- in a model ---


@pytest.fixture(scope="module")
def model() -> Any:
    return qwen2_fp16_fix.fix(build(TINY, STRESS, attn_implementation="sdpa").half())


@torch.no_grad()
def decoded(model: Any, padded: bool = False) -> tuple[Tensor, Calls]:
    """The logits of the last token, written over a cache of the ones before, and the calls in that step."""
    allowed = torch.ones_like(PROMPT)
    if padded:
        allowed[0, :5] = 0
    cache = model(input_ids=PROMPT[:, :-1], attention_mask=allowed[:, :-1], use_cache=True).past_key_values
    with Calls() as calls:
        got = model(input_ids=PROMPT[:, -1:], attention_mask=allowed, **{CACHE: cache}).logits
    return got, calls


@pytest.mark.parametrize("padded", [False, True])
def test_a_token_is_written_without_shared_heads(padded: bool, model: Any) -> None:
    got, calls = decoded(model, padded)
    groups = TINY.heads // TINY.kv_heads
    assert [(query[1:3], key[1], shared) for query, key, shared in calls.seen] == [
        ((TINY.kv_heads, groups), TINY.kv_heads, False)
    ] * TINY.layers
    oracle, _ = decoded(build(TINY, STRESS, attn_implementation="eager"), padded)
    assert torch.isfinite(got).all()
    assert kl_to(oracle, got) < 2e-5  # what float16 costs all kinds together: tests/stress


def test_an_older_gpus_prompt_and_token_compile_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for the module, and the question about the card, are traced; no graph breaks.

    The first length makes a graph of its own, the last one for any length.
    """
    monkeypatch.setattr(sdpa, "shares_key_heads", lambda tensor: False)
    torch._dynamo.reset()
    model: Any = qwen2_fp16_fix.fix(build(replace(TINY, layers=2), STRESS, attn_implementation="sdpa").half())
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for length in (24, 1, 9):
            got, expected = (run(input_ids=PROMPT[:, :length], use_cache=False).logits for run in (compiled, model))
            torch.testing.assert_close(got, expected, atol=8e-3, rtol=0)  # two float16 steps of a logit of 4


def test_gradients_are_those_of_attention() -> None:
    tensors = [x.requires_grad_() for x in operands(dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: sdpa.sdpa_attention(nn.Module(), *x, None, scaling=0.25)[0], tensors)


def test_dropout_is_handed_on() -> None:
    torch.manual_seed(0)
    found, _ = sdpa.sdpa_attention(nn.Module(), *operands(), None, scaling=0.25, dropout=0.9)
    kept, _ = sdpa.sdpa_attention(nn.Module(), *operands(), None, scaling=0.25)
    assert (found - kept).abs().max() > 0.1


# --- whose sdpa it is ---


def registered(monkeypatch: pytest.MonkeyPatch, function: Any, name: str = "sdpa") -> None:
    table = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(table._global_mapping, name, function)
    masks = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    monkeypatch.setitem(masks._global_mapping, name, masks["sdpa"])


@functools.wraps(sdpa.STOCK_SDPA)
def wrapper(*args: Any, **kwargs: Any) -> Any:
    return sdpa.STOCK_SDPA(*args, **kwargs)


SOMEBODY_ELSES = {"wraps": wrapper, "partial": functools.partial(sdpa.STOCK_SDPA), "another": lambda *a, **k: None}


@pytest.mark.parametrize("function", SOMEBODY_ELSES.values(), ids=SOMEBODY_ELSES)
def test_somebody_elses_sdpa_is_called(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.ours_for("sdpa") is sdpa.sdpa_attention
    registered(monkeypatch, function)
    assert attention.ours_for("sdpa") is None
    assert attention.implementation_of("sdpa") is function
    assert sdpa.stock_sdpa() is None


def test_transformers_sdpa_is_known_under_any_name(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    registered(monkeypatch, sdpa.STOCK_SDPA, "mine")
    expected, _ = decoded(model)
    other = copy.deepcopy(model)
    other.set_attn_implementation("mine")
    got, calls = decoded(other)
    assert torch.equal(got, expected)
    assert not any(shared for _, _, shared in calls.seen)
