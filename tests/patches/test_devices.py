"""Devices that are not here: one without fp64, whose kernels are those of torch's MPS, is played on a CPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

import qwen2_fp16_fix
from benchmarks.cost import cost_of
from qwen2_fp16_fix.diagnosis import self_test
from qwen2_fp16_fix.patches import numerics
from qwen2_fp16_fix.scanning import quantisation
from tests.helpers import kl_to
from tests.stress import KINDS, TINY, build

MPS = torch.device("mps")
CREATORS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.arange, torch.tensor)


class OnMps(TorchFunctionMode):
    """While entered, every tensor is on MPS, but for what was made on or brought to the CPU, and what came of that.

    There is no fp64 there; addcmul rounds each product before the next; softmax cannot bear its own input as output;
    baddbmm multiplies what beta 0 takes away elsewhere; frexp has no kernel.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, (Tensor, torch.device, str))]
        tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
        if function == Tensor.device.__get__:
            return torch.device("cpu") if on_cpu(args[0]) else MPS
        if function is Tensor.double and not on_cpu(args[0]):
            raise TypeError(NO_FP64)
        there = [str(leaf) for leaf in given if str(leaf) in ("cpu", "mps") and not isinstance(leaf, Tensor)]
        args, kwargs = tree_map(brought_here, (args, kwargs or {}))
        result = OVERRIDES.get(function, function)(*args, **kwargs)
        if function is Tensor.cpu or "cpu" in there:
            host = True
        elif "mps" in there:
            host = False
        else:
            host = all(map(on_cpu, tensors)) if tensors else function in CREATORS
        return tree_map(lambda leaf: placed(leaf, host) if isinstance(leaf, Tensor) else leaf, result)


NO_FP64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."


def brought_here(argument: Any) -> Any:
    """The CPU for MPS; any other argument as it is."""
    return "cpu" if isinstance(argument, (str, torch.device)) and str(argument) == "mps" else argument


def on_cpu(tensor: Tensor) -> bool:
    return bool(vars(tensor).get("on_cpu", False))


def placed(tensor: Tensor, host: bool) -> Tensor:
    """The tensor, marked. A move that found nothing to do has returned what stays on the other device."""
    if tensor.dtype == torch.float64 and not host:
        raise TypeError(NO_FP64)
    if on_cpu(tensor) != host:
        tensor = tensor.view_as(tensor)
        vars(tensor)["on_cpu"] = host
    return tensor


def addcmul(input: Tensor, first: Tensor, second: Tensor, value: float = 1, out: Tensor | None = None) -> Tensor:
    """As torch's MPSGraph: in the operands' common type, rounding after each step."""
    wide = torch.result_type(first, second)
    result = input + (first.to(wide) * second.to(wide)) * value
    return result if out is None else out.copy_(result)


def softmax(input: Tensor, dim: int, out: Tensor | None = None) -> Tensor:
    assert out is None or out.data_ptr() != input.data_ptr(), "this device reads while it writes"
    return torch.nn.functional.softmax(input, dim)


def baddbmm(input: Tensor, first: Tensor, second: Tensor, beta: float, alpha: float) -> Tensor:
    return input * beta + first @ second * alpha


def frexp(input: Tensor) -> Any:
    raise NotImplementedError("The operator 'aten::frexp.Tensor_out' is not currently implemented for the MPS device.")


OVERRIDES: dict[Any, Callable[..., Any]] = {
    torch.addcmul: addcmul,
    Tensor.addcmul_: lambda tensor, *operands, **options: tensor.copy_(addcmul(tensor, *operands, **options)),
    torch.softmax: softmax,
    torch.baddbmm: baddbmm,
    torch.frexp: frexp,
}


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def test_the_stand_in_is_as_torchs_mps() -> None:
    """What it is there to show: 300 · 300 · 2^-3 infinite in float16, no fp64, and a copy on the CPU that has it."""
    with OnMps():
        x = torch.full((2,), 300.0, dtype=torch.float16, device="mps")
        assert x.device == (x + 1).device == x.float().device == x[:1].device == MPS
        assert torch.addcmul(x, x, x, value=2.0**-3).isinf().all()
        for widened in (Tensor.double, lambda x: x.to(torch.float64)):
            with pytest.raises(TypeError, match="float64"):
                widened(x)
        assert x.cpu().double().device.type == "cpu"
        assert x.device == MPS
        with pytest.raises(AssertionError, match="writes"):
            torch.softmax(y := x.float(), -1, out=y)
        with pytest.raises(NotImplementedError):
            torch.frexp(x)


def test_a_plan_is_made_on_a_device_without_fp64() -> None:
    """Centres, exponents and certificate: all that needs fp64 is done on the CPU, and comes out the same."""
    shape = replace(TINY, layers=2)
    here, there = qwen2_fp16_fix.fix(build(shape, KINDS).half()), build(shape, KINDS).half()
    with OnMps():
        qwen2_fp16_fix.fix(there)
        proof = qwen2_fp16_fix.certify(there)
    assert replace(proof, seconds=0) == replace(qwen2_fp16_fix.certify(here), seconds=0)
    assert qwen2_fp16_fix.status(there).model == qwen2_fp16_fix.status(here).model
    for one, other in zip(here.model.layers, there.model.layers, strict=True):
        assert torch.equal(one.self_attn.shift, other.self_attn.shift)
        assert one.mlp.exponent == other.mlp.exponent


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("planned", [True, False], ids=["planned", "by token"])
def test_a_model_runs_on_a_device_with_the_kernels_of_mps(attention: str, planned: bool) -> None:
    """It was infinite there in just the layers that have an exponent, and without a plan it did not run at all."""
    tokens = self_test.prompt()  # with a product of 90,000
    oracle = logits(self_test.stock_model(attention), tokens)
    model = self_test.stock_model(attention).half()
    with OnMps():
        qwen2_fp16_fix.fix(model)
        assert max(layer.mlp.exponent for layer in model.model.layers) > 0
        if not planned:
            for layer in model.model.layers:
                for part in (layer.mlp, layer.self_attn):
                    part.set_exponent(None)
        found = logits(model, tokens)
    assert torch.isfinite(found).all()
    assert kl_to(oracle, found) < self_test.KL_LIMIT


def test_an_outlier_scan_sums_in_fp64_on_the_cpu() -> None:
    found = quantisation.RoundingLoss(127)
    with OnMps():
        found.add(torch.randn(8, 4).to("mps"))
    assert found.error is not None
    assert found.error.dtype == torch.float64


# --- one kernel or two ---


@pytest.mark.parametrize("kind", ["cpu", "cuda", "xpu", "mps", "npu"])
def test_the_scaled_product_has_the_same_bits_on_any_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fp32 product of two float16 numbers is exact, and so is its scale: both forms round once."""
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(4096, generator=generator).mul(100).half() for _ in range(2))
    tiny = torch.tensor([2.0**-24, 2.0**-12, 6e-5]).half()
    gate, up = torch.cat((gate, tiny, tiny)), torch.cat((up, tiny, tiny.flip(0)))
    zero = torch.zeros((), dtype=torch.float16)
    monkeypatch.setattr(numerics, "device_of", lambda tensor: kind)
    for exponent in (1, 3, 24):
        got = numerics.scaled_product(zero, gate, up, exponent)
        assert torch.equal(got, torch.addcmul(zero, gate, up, value=2.0**-exponent))
        assert got.dtype == torch.float16
    kernels = {launch.name for launch in cost_of(lambda: numerics.scaled_product(zero, gate, up, 3)).launches}
    assert ("addcmul" in kernels) == (kind in ("cpu", "cuda", "xpu"))


@pytest.mark.parametrize("kind", ["cpu", "cuda", "xpu", "mps", "npu"])
def test_a_softmax_is_written_over_its_input_where_that_is_known_to_be_right(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "device_of", lambda tensor: kind)
    scores = torch.randn(2, 3, 5)
    before, expected = scores.clone(), scores.softmax(-1)
    got = numerics.softmax(scores)
    assert torch.equal(got, expected)
    in_place = kind in ("cpu", "cuda")
    assert (got.data_ptr() == scores.data_ptr()) == in_place
    assert torch.equal(scores, expected if in_place else before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel in question is a GPU's")
@pytest.mark.parametrize("keys", [7, 1024, 5000])  # by warp, by block, and from global memory
def test_a_softmax_over_its_input_has_the_same_bits_on_a_gpu(keys: int) -> None:
    scores = torch.randn(2, 4, 33, keys, device="cuda") * 30
    expected = torch.softmax(scores, dim=-1)
    assert torch.equal(numerics.softmax(scores), expected)


def test_the_kind_of_a_device_is_torchs_name_for_it() -> None:
    assert numerics.device_of(torch.empty(1, device="meta")) == "meta"


def test_a_query_of_nan_stays_in_its_row() -> None:
    """MPS multiplies what beta 0 takes away elsewhere: the first number of the queries would reach all of them."""
    query, key = torch.randn(2, 2, 3, 8).half(), torch.randn(2, 1, 3, 8).half()
    query[0, 0, 0] = torch.nan
    with OnMps():
        output, _ = numerics.grouped_attention(query, key, key, None, 0.5)
    assert torch.isfinite(output[1]).all()
    assert torch.isfinite(output[0, 1]).all()


def test_a_tokens_exponent_needs_no_kernel_that_devices_lack() -> None:
    """frexp's, read from the bits: it has no kernel for MPS, where all that is scaled by token raised."""
    numbers = torch.tensor([0.0, 1e-40, 0.5, 0.75, 1.0, -1.0, 1.5, 2.0, 65504.0, -3e38, 2.0**127])
    got = numerics.token_exponent(numbers[:, None]).flatten()
    assert torch.equal(got, torch.frexp(numbers).exponent.clamp(min=0))
    assert got.dtype == torch.int32
    assert torch.equal(numerics.token_exponent(numbers[:, None], 8).flatten(), (got - 8).clamp(min=0))


# --- the self-test ---


def test_the_self_test_says_what_a_device_without_fp64_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TypeError of torch's ended `doctor`. Whatever it is, it is a sentence about the device."""
    for error in (TypeError(NO_FP64), NotImplementedError("no kernel"), KeyError("rope"), torch.OutOfMemoryError("no")):

        def run(*_: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(self_test, "_row", run)
        outcome = self_test.self_test("mps")
        assert (outcome.passed, outcome.remark.code) == (False, "self_test.not_run")
        assert type(error).__name__ in outcome.remark.values["reason"]
