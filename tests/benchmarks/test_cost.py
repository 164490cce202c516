"""What the fix costs, counted: launches, bytes, memory and host syncs of a layer, against stock's. Nothing is timed."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.models.qwen2 import modeling_qwen2

from benchmarks import layer_cost, report, two_parts, workloads
from benchmarks.cost import Cost, cost_of
from benchmarks.layer_cost import cost_of_layer
from benchmarks.models import VOCABULARY, WIDTHS, Workshop
from tests import stress

pytestmark = pytest.mark.xdist_group("cost")  # one worker counts, for all
WORKSHOP = Workshop(torch.device("cpu"))
WIDTH = "0.5b"
ATTENTION = ("eager", "sdpa")


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


A, B, ROW = half(8, 16), half(8, 16), half(16)
TABLE, IDS = half(100, 16), torch.tensor([3, 5, 7])
CACHE = half(2, 64, 16)
N = A.nbytes  # 256


@pytest.mark.parametrize(
    ("run", "launches", "read", "written"),
    [
        pytest.param(lambda: A + B, 1, 2 * N, N, id="a sum"),
        pytest.param(lambda: A * A, 1, N, N, id="one operand twice is read once"),
        pytest.param(lambda: A + ROW.expand(8, 16), 1, N + 32, N, id="a broadcast operand is read once"),
        pytest.param(lambda: A[2:4, ::2] * 1, 1, 32, 32, id="a slice is read as far as it reaches"),
        pytest.param(lambda: A.view(16, 8).t().unsqueeze(0).expand(4, 8, 16).detach()[:2], 0, 0, 0, id="views"),
        pytest.param(lambda: A.reshape(16, 8), 0, 0, 0, id="a reshape that is a view"),
        pytest.param(lambda: A.t().reshape(-1), 1, N, N, id="a reshape that has to copy"),
        pytest.param(lambda: A.chunk(2, dim=-1), 0, 0, 0, id="a split"),
        pytest.param(lambda: A.to(torch.float16), 0, 0, 0, id="a cast to what it is"),
        pytest.param(lambda: A.float(), 1, N, 2 * N, id="a cast"),
        pytest.param(lambda: torch.empty(9), 0, 0, 0, id="memory without numbers"),
        pytest.param(lambda: torch.zeros(9), 1, 0, 36, id="zeros"),
        pytest.param(lambda: B.add_(A), 1, 2 * N, N, id="in place"),
        pytest.param(lambda: torch.add(A, A, out=B), 1, N, N, id="what it is told to write to is not read"),
        pytest.param(lambda: B.copy_(A), 1, N, N, id="what is overwritten is not read"),
        pytest.param(lambda: B.zero_(), 1, 0, N, id="what is zeroed is not read"),
        pytest.param(lambda: torch.cat((A, B)), 1, 2 * N, 2 * N, id="cat"),
        pytest.param(lambda: nn.functional.embedding(IDS, TABLE), 1, 24 + 96, 96, id="a table is read where looked up"),
        pytest.param(
            lambda: CACHE.index_copy_(1, IDS, half(2, 3, 16).detach()), 2, 24 + 192, 192 + 192, id="a cache's new rows"
        ),
        pytest.param(lambda: A.softmax(-1, dtype=torch.float32), 1, N, 2 * N, id="softmax widens as it reads"),
        pytest.param(lambda: A.float().softmax(-1), 2, N + 2 * N, 2 * N + 2 * N, id="a cast of one's own does not"),
    ],
)  # fmt: skip
def test_launches_and_bytes_as_counted_by_hand(run: Callable[[], Any], launches: int, read: int, written: int) -> None:
    cost = cost_of(run)
    assert (cost.kernels, cost.read, cost.written) == (launches, read, written), cost.launches
    assert not cost.syncs


def test_a_linear_is_one_launch_that_reads_its_weight() -> None:
    linear = nn.Linear(16, 32).half()
    cost = cost_of(lambda: linear(half(1, 8, 16)))
    assert cost.kernels == 2  # half() fills its input
    assert cost.moved == 2 * N + 16 * 32 * 2 + 32 * 2 + 8 * 32 * 2
    assert cost.flops == 2 * 8 * 16 * 32


def test_fused_attention_is_one_launch() -> None:
    query, key = half(1, 4, 8, 16), half(1, 2, 8, 16)
    attend = nn.functional.scaled_dot_product_attention
    cost = cost_of(lambda: attend(query, key, key, is_causal=True, enable_gqa=True))
    assert cost.kernels == 1
    assert cost.read == query.nbytes + key.nbytes
    assert cost.flops == 4 * 4 * 8 * 8 * 16


@pytest.mark.parametrize(
    "read",
    [
        lambda: ROW[0].item(), lambda: bool(ROW[0]), lambda: float(ROW[0]), lambda: ROW.tolist(), lambda: ROW.cpu(),
        lambda: ROW.nonzero(), lambda: ROW[ROW > 0], lambda: torch.equal(A, B),
    ],
    ids=["item", "bool", "float", "tolist", "cpu", "nonzero", "a boolean index", "equal"],
)  # fmt: skip
def test_every_wait_for_the_host_is_seen(read: Callable[[], Any]) -> None:
    assert cost_of(read).syncs.total() == 1


def test_an_index_of_numbers_waits_for_nobody() -> None:
    assert cost_of(lambda: TABLE[IDS]).syncs.total() == 0


def test_peak_memory_as_counted_by_hand() -> None:
    def run() -> None:
        first = A + 1
        second = first * 2
        del first
        third = second.view(-1) * 3  # two at a time, never three
        del second
        assert third.numel() == A.numel()

    assert cost_of(run).peak == 2 * N
    assert cost_of(lambda: A.softmax(-1, dtype=torch.float32)).peak == 2 * N


def models(attention: str) -> tuple[Any, Any]:
    stock, fixed = (WORKSHOP.model(variant, WIDTH, 3, attention) for variant in ("stock fp16", "fixed fp16"))
    return stock, fixed


CASES = {"prefill": 512, "decode": 1024}


@functools.cache
def layer(attention: str, phase: str, exponent: int = 0) -> tuple[Cost, Cost, Cost, Cost]:
    """A layer stock and fixed, and the forward besides its layers, stock and fixed."""
    stock, fixed = models(attention)
    for block in fixed.model.layers:
        block.mlp.set_exponent(exponent)
    before, after = (cost_of_layer(model, phase, CASES[phase], 1) for model in (stock, fixed))
    return before[0], after[0], before[1], after[1]


def test_what_is_not_computed_is_counted_all_the_same() -> None:
    model = models("eager")[1]
    step = workloads.prefill(model, 16, 1)
    assert cost_of(step, compute=False) == cost_of(step)


def test_layers_cost_the_same_each() -> None:
    """Else two and three layers would say nothing of twenty-eight."""
    model = WORKSHOP.model("fixed fp16", "0.5b", 4, "sdpa")
    whole = cost_of(workloads.prefill(model, 64, 1), compute=False)
    one, rest = cost_of_layer(model, "prefill", 64, 1)
    assert whole.launches.total() == rest.kernels + 4 * one.kernels
    assert whole.moved == rest.moved + 4 * one.moved
    assert whole.flops == rest.flops + 4 * one.flops


@pytest.mark.parametrize(
    ("attention", "phase", "exponent"),
    [
        ("eager", "prefill", 0),
        ("eager", "decode", 0),
        ("sdpa", "prefill", 0),
        ("sdpa", "decode", 0),
        ("eager", "prefill", 3),
        ("eager", "decode", 3),
        ("sdpa", "prefill", 3),
        ("sdpa", "decode", 3),
    ],
)
def test_a_layer_launches_no_more_kernels_than_stock(attention: str, phase: str, exponent: int) -> None:
    """Where kernels are short, as in decode, launches are the time. Layers of 7B have an exponent; 0.5B's need none."""
    stock, fixed, _, _ = layer(attention, phase, exponent)
    assert fixed.kernels <= stock.kernels


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("phase", CASES)
def test_a_torch_without_a_kernel_for_the_norm_launches_four_more(attention: str, phase: str) -> None:
    """Two for each norm, and still fewer than stock, whose norms are in parts in any torch."""
    stock, fixed, _, _ = layer(attention, phase)
    in_parts, rest = cost_of_layer(models(attention)[1], phase, CASES[phase], 1, fused_norm=False)
    assert in_parts.kernels == fixed.kernels + 4 <= stock.kernels
    assert rest.kernels == layer(attention, phase)[3].kernels + 2


@pytest.fixture(scope="module")
def workshop_7b() -> Workshop:
    """Three layers whose large weights nobody has written to: they take no memory, and no count depends on them."""
    settings = stress.config(replace(WIDTHS["7b"], layers=3, vocab=VOCABULARY), max_position_embeddings=32768)
    with torch.device("meta"):
        model = modeling_qwen2.Qwen2ForCausalLM(settings)
    model.half().to_empty(device="cpu").eval()
    model.model.rotary_emb = modeling_qwen2.Qwen2RotaryEmbedding(settings)
    for parameter in model.parameters():
        if parameter.numel() < 2**24:
            parameter.data.zero_()
    workshop = Workshop(torch.device("cpu"))
    workshop.key, workshop.weights = ("7b", 3), {"fp16": model}
    return workshop


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("phase", CASES)
def test_the_documents_count_what_is_counted_now(attention: str, phase: str, workshop_7b: Workshop) -> None:
    """A table that was written before the code changed. `python -m benchmarks cost --write` writes it anew."""
    stock, fixed = (workshop_7b.model(variant, "7b", 3, attention) for variant in ("stock fp16", "fixed fp16"))
    for block in fixed.model.layers:
        block.mlp.set_exponent(3)  # as random weights of this width ask for
    before, after = (cost_of_layer(model, phase, CASES[phase], 1) for model in (stock, fixed))
    row = layer_cost.Row(phase, CASES[phase], 1, attention, before[0], after[0], before[1], after[1])
    page = report.DOCUMENT.read_text("utf-8")
    assert report.markdown_table((), [layer_cost.cells(row)]).splitlines()[-1] in page
    launches, moved = ((getattr(row.stock, of), getattr(row.fixed, of)) for of in ("kernels", "moved"))
    short = "| {} → {} | {:,.0f} → {:,.0f} |".format(*launches, *(number / 1e6 for number in moved))
    assert short in page


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("phase", CASES)
def test_a_forward_besides_its_layers_launches_no_more_kernels_than_stock(attention: str, phase: str) -> None:
    _, _, stock, fixed = layer(attention, phase)
    assert fixed.kernels <= stock.kernels


@pytest.mark.parametrize(
    ("attention", "phase", "bound"),
    [
        ("eager", "prefill", 1.00),
        ("sdpa", "prefill", 1.02),
        ("eager", "decode", 1.00),
        ("sdpa", "decode", 1.02),
    ],
)
def test_a_layer_moves_no_more_bytes_than_promised(attention: str, phase: str, bound: float) -> None:
    stock, fixed, _, _ = layer(attention, phase)
    assert fixed.moved <= bound * stock.moved


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("phase", CASES)
def test_the_matmuls_are_stocks(attention: str, phase: str) -> None:
    stock, fixed, _, _ = layer(attention, phase)
    assert fixed.flops == stock.flops > 0


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("padded", [False, True])
def test_no_host_sync_that_stock_has_not(attention: str, padded: bool) -> None:
    """One `.item()` a layer keeps the GPU waiting for the host, layer after layer."""

    def run(model: Any) -> Callable[[], Any]:
        ids = torch.ones(2, 8, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        return lambda: model(input_ids=ids, attention_mask=mask if padded else None, use_cache=True)

    stock, fixed = (cost_of(run(model)).syncs for model in models(attention))
    assert not fixed - stock
    decoded = [cost_of(workloads.decode(model, 32, 2)).syncs for model in models(attention)]
    assert not decoded[1] - decoded[0]


@pytest.mark.parametrize(
    ("attention", "bound"),
    [
        ("eager", 1.00),
        ("sdpa", 1.02),
    ],
)
def test_a_forward_takes_no_more_memory_than_promised(attention: str, bound: float) -> None:
    stock, fixed = (cost_of(workloads.prefill(model, 2048, 1), compute=False).peak for model in models(attention))
    assert fixed <= bound * stock


@pytest.mark.parametrize("attention", ATTENTION)
def test_the_cache_is_stocks_size_to_the_byte(attention: str) -> None:
    """A key that stays in fp32 would double it."""

    def tokens_and_bytes(model: Any) -> list[tuple[torch.dtype, torch.Size, int]]:
        with torch.no_grad():
            cache = model(input_ids=torch.ones(2, 8, dtype=torch.long), use_cache=True).past_key_values
            model(input_ids=torch.ones(2, 1, dtype=torch.long), **{workloads.CACHE: cache})
        kept = [tensor for entry in cache.layers for tensor in (entry.keys, entry.values)]
        return [(tensor.dtype, tensor.shape, tensor.untyped_storage().nbytes()) for tensor in kept]

    stock, fixed = (tokens_and_bytes(model) for model in models(attention))
    assert stock == fixed
    assert len(fixed) == 2 * 3


@pytest.mark.parametrize("attention", ATTENTION)
def test_pairs_in_two_parts_are_measured_where_they_are(attention: str) -> None:
    """The layer with them stores wider keys and launches more; the one without is any fixed layer."""
    fixed = WORKSHOP.model("fixed fp16", WIDTH, 3, attention)
    found = []
    for model in (fixed, two_parts.split(fixed, 0), two_parts.split(fixed, 2)):
        cache = workloads.filled(DynamicCache(), model, 8, 1)
        assert len({layer.keys.shape[-1] for layer in cache.layers}) == 1
        found.append((cache.layers[0].keys.shape[-1], cost_of_layer(model, "decode", 8, 1)[0].kernels))
    assert found[0] == found[1]
    assert found[2][0] == found[1][0] + 8
    assert found[1][1] < found[2][1] <= found[1][1] + 16
