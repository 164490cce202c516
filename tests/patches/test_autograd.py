"""A backward reaches the attention weights that are returned, and transforms of torch.func pass through attention."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen2_fp16_fix.patches import numerics
from qwen2_fp16_fix.patches.autograd import backward_through
from tests.patches.models import fixed
from tests.stress import TINY, build, random_prompt

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func calls it

PROMPT = random_prompt(TINY, batch=2, length=24)
SCALE = 2.0**6  # of the loss: float16 has no gradient below 2^-24


@pytest.fixture(params=["cpu", "elsewhere"])
def arithmetic(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of a CPU, and the one that any other device gets."""
    if request.param == "elsewhere":
        monkeypatch.setattr(sys.modules[numerics.__name__], "runs_on_cpu", lambda tensor: False)


def off(exact: Tensor, found: Tensor) -> float:
    """‖exact - found‖ / ‖exact‖. Both must be finite."""
    assert torch.isfinite(found).all()
    assert exact.shape == found.shape
    return float((exact.double() - found.double()).norm() / exact.double().norm())


def heads() -> list[Tensor]:
    """Query, key and value in float16, which need gradients."""
    torch.manual_seed(0)
    shapes = (2, 4, 16, 8), (2, 2, 24, 8), (2, 2, 24, 8)
    return [torch.randn(shape).half().requires_grad_() for shape in shapes]


def attend(*heads: Tensor) -> tuple[Tensor, Tensor]:
    return numerics.grouped_attention(*heads, None, 0.5)  # type: ignore[arg-type]


def attention_gradients(model: Any) -> list[Tensor]:
    """Of the attention weights that a model returns."""
    out = model(input_ids=PROMPT, labels=PROMPT, output_attentions=True, use_cache=False)
    for weights in out.attentions:
        weights.retain_grad()
    (out.loss * SCALE).backward()
    return [weights.grad for weights in out.attentions]


@pytest.mark.usefixtures("arithmetic")
def test_returned_weights_have_the_gradient_that_they_have_in_fp32() -> None:
    """On a CPU they had none: the output was made of the weights before they were rounded."""
    oracle = attention_gradients(build(TINY, (), attn_implementation="eager"))
    found = attention_gradients(fixed())
    for exact, gradient in zip(oracle, found, strict=True):
        assert gradient.dtype == torch.float16
        assert off(exact, gradient) < 1e-2  # roundings to 11 bits, through 4 layers: 2e-3


def test_the_gradient_of_the_scores_is_as_exact_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through float16 alone it would lose what is below 2^-24 and overflow at 65504. Bit for bit, at any size."""
    for size in (2.0**-20, 1.0, 2.0**10):
        results = []
        for through in (backward_through, lambda rounded, exact: exact):
            monkeypatch.setattr(sys.modules[numerics.__name__], "backward_through", through)
            given = heads()
            output, weights = attend(*given)
            (output.square().sum() * size).backward()
            results.append([output, weights, *(head.grad for head in given)])
        for found, before in zip(*results, strict=True):
            assert torch.isfinite(found).all()
            assert torch.equal(found, before)


def test_a_gradient_beyond_float16_is_cut_in_the_weights_alone() -> None:
    exact = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    rounded = exact.half()
    rounded.retain_grad()
    wanted = torch.tensor([1e6, 2.0**-30, 1.0 + 2.0**-20])
    (backward_through(rounded, exact) * wanted).sum().backward()
    assert rounded.grad is not None
    assert rounded.grad.tolist() == [65504.0, 0.0, 1.0]
    assert exact.grad is not None
    assert torch.equal(exact.grad, wanted)


def test_nothing_more_is_kept_for_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    sizes = []
    for through in (backward_through, lambda rounded, exact: exact):
        monkeypatch.setattr(sys.modules[numerics.__name__], "backward_through", through)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            held = attend(*heads())
        sizes.append(sum(kept.values()))
        del held
    assert sizes[0] == sizes[1] > 0


@pytest.mark.usefixtures("arithmetic")
def test_transforms_pass() -> None:
    """A softmax that is written over its scores stops forward-mode autograd and vmap."""
    query, key, value = (head.detach() for head in heads())

    def loss(query: Tensor) -> Tensor:
        return attend(query, key, value)[0].float().square().sum()

    given = query.clone().requires_grad_()
    loss(given).backward()
    assert given.grad is not None
    gradient = torch.func.grad(loss)(query)
    assert torch.equal(gradient, given.grad)
    direction = torch.randn(query.shape).half()
    _, slope = torch.func.jvp(loss, (query,), (direction,))
    # Both sides round to 11 bits, the left one only in products with the direction.
    assert float(slope) == pytest.approx(float((gradient.float() * direction.float()).sum()), rel=1e-2)
    both = torch.func.vmap(torch.func.grad(loss))(torch.stack((query, query)))
    assert off(gradient, both[1]) < 2e-3
    with torch.no_grad():
        values = torch.func.vmap(loss)(torch.stack((query, query)))
    assert float(values[1]) == pytest.approx(float(loss(query)), rel=2e-3)


def masks() -> Tensor:
    """(2, batch, 1, S, S): causal, and causal without the first three tokens."""
    mask = torch.full((2, 1, 1, 24, 24), torch.finfo(torch.float16).min, dtype=torch.float16).triu(1)
    mask[1, ..., 3:, :3] = torch.finfo(torch.float16).min
    return mask.expand(-1, 2, -1, -1, -1)


def two_of(model: Any, *names: str) -> dict[str, Tensor]:
    """Two values of each of these weights."""
    weights = dict(model.named_parameters())
    return {name: torch.stack((weights[name].detach(), weights[name].detach() * 1.5)) for name in names}


LAYER = "model.layers.0."
BATCHED: dict[str, Any] = {
    "embeddings": lambda model: {"inputs_embeds": torch.randn(2, 2, 24, TINY.hidden).half()},
    "mask": lambda model: {"attention_mask": masks()},
    "gain": lambda model: two_of(model, f"{LAYER}input_layernorm.weight"),
    "biases": lambda model: two_of(model, f"{LAYER}self_attn.k_proj.bias", f"{LAYER}self_attn.q_proj.bias"),
    "gate": lambda model: two_of(model, f"{LAYER}mlp.gate_proj.weight"),
    "values": lambda model: two_of(model, f"{LAYER}self_attn.v_proj.weight"),
    "all weights": lambda model: two_of(model, *dict(model.named_parameters())),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("batched", BATCHED)
def test_one_argument_alone_may_have_a_batch(batched: str) -> None:
    """Whatever vmap maps over: where stock runs, a fixed model does. A mask larger than the scores could not be added
    in their memory."""
    model = fixed()
    mapped = BATCHED[batched](model)

    def logits(given: dict[str, Tensor]) -> Tensor:
        inputs = {name: given[name] for name in given if "." not in name}
        weights = {name: given[name] for name in given if "." in name}
        inputs |= {} if "inputs_embeds" in inputs else {"input_ids": PROMPT}
        found: Tensor = torch.func.functional_call(model, weights, (), {**inputs, "use_cache": False}).logits.float()
        return found

    with torch.no_grad():
        each = [logits({name: value[index] for name, value in mapped.items()}) for index in (0, 1)]
        found = torch.func.vmap(logits)(mapped)
    assert off(torch.stack(each), found) < 2**-8  # float16 rounds a logit by 2^-11, and sums come in another order

    def first(given: dict[str, Tensor]) -> Tensor:
        return logits(given)[0, -1, :2]

    one = {name: value[0] for name, value in mapped.items() if value.is_floating_point() and "mask" not in name}
    if one:
        slope = torch.func.jvp(first, (one,), ({name: value * 0.1 for name, value in one.items()},))[1]
        rows = torch.func.jacrev(first)(one)
        along = sum((rows[name].float() * one[name].float() * 0.1).flatten(1).sum(1) for name in one)
        assert off(along.detach(), slope.detach()) < 2**-4  # forwards and backwards round to float16 at other places
