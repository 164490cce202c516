"""The rows of patches/architecture.py describe real models: nothing missing, nothing made up, nothing in another order.

The second row, of Qwen3, is written here alone. It shows that a row is enough, and that reading one patches nothing.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qwen2_fp16_fix
from qwen2_fp16_fix.patches import swap
from qwen2_fp16_fix.patches.architecture import (
    QWEN2,
    ROWS,
    Architecture,
    AttentionCall,
    Part,
    Site,
    qwen2_arguments,
    roles_by_class,
    row_of,
)
from qwen2_fp16_fix.patches.range_bounds import Exponents, LayerBounds, LayerShape, layer_shapes

HEADS, KEY_HEADS, TOKENS = 4, 2, 5
#: No two sizes are equal, so that none passes for another.
SHAPE = LayerShape(hidden=20, heads=HEADS, kv_heads=KEY_HEADS, head_dim=6, positions=64)
INTERMEDIATE = 28

QWEN3_HEAD_NORMS = tuple(
    Part(f"layers.*.self_attn.{name}", "Qwen3RMSNorm", "norm", width="head") for name in ("q_norm", "k_norm")
)


def qwen3_sites() -> tuple[Site, ...]:
    """Qwen2's, and the outputs of the two norms, each right after its projection."""
    sites = []
    for site in QWEN2.sites:
        sites.append(site)
        if site.name in ("q", "k"):
            name = f"{site.name}_norm"
            sites.append(Site(name, f"{name} output", f"self_attn.{name}:output", "norm", "number"))
    return tuple(sites)


QWEN3 = QWEN2._replace(
    module="transformers.models.qwen3.modeling_qwen3",
    base="Qwen3Model",
    model_types=("qwen3",),
    since="4.51.0",
    parts=(*(part._replace(stock=part.stock.replace("Qwen2", "Qwen3")) for part in QWEN2.parts), *QWEN3_HEAD_NORMS),
    linears=tuple(linear._replace(bias=False) for linear in QWEN2.linears),
    sites=qwen3_sites(),
    heads=tuple(head._replace(since="4.51.0") for head in QWEN2.heads),
)
BOTH = pytest.mark.parametrize("row", [QWEN2, QWEN3], ids=lambda row: row.base)


def tiny(row: Architecture, head: str = "Model") -> Any:
    """A stock model of two layers, in fp32."""
    stock = import_module(row.module)
    prefix = row.base.removesuffix("Model")
    config = getattr(stock, f"{prefix}Config")(
        vocab_size=32,
        hidden_size=SHAPE.hidden,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=SHAPE.head_dim,
        max_position_embeddings=SHAPE.positions,
    )
    with qwen2_fp16_fix.stock_models():
        return getattr(stock, f"{prefix}{head}")._from_config(config, attn_implementation="eager").eval()


def test_it_is_read_without_torch(python: Callable[..., CompletedProcess[str]]) -> None:
    """What only reads files of a checkpoint must not load torch or transformers for the names in them."""
    heavy = "import sys, qwen2_fp16_fix.patches.architecture; print({'torch', 'transformers'} & {*sys.modules})"
    assert python("-c", heavy).stdout == "set()\n"


@BOTH
def test_the_weights_of_a_row_are_those_of_a_model(row: Architecture) -> None:
    """Norms and linears, their shapes, and which of them have a bias."""
    shapes = layer_shapes(SHAPE, INTERMEDIATE, row)
    unbiased = {f"{linear.name}.bias" for linear in row.linears if not linear.bias}
    found = {name: tuple(weight.shape) for name, weight in tiny(row).layers[0].named_parameters()}
    assert found == {name: shape for name, shape in shapes.items() if name not in unbiased}
    assert unbiased <= {*shapes}  # they are listed, for a checkpoint that has one all the same


@BOTH
def test_the_linears_of_a_row_are_those_of_a_model(row: Architecture) -> None:
    linears = {name: each for name, each in tiny(row).layers[0].named_modules() if isinstance(each, nn.Linear)}
    assert {name: each.bias is not None for name, each in linears.items()} == {
        linear.name: linear.bias for linear in row.linears
    }
    assert set(row.owners()) == {name.partition(".")[0] for name in linears}


@BOTH
def test_the_parts_of_a_row_are_those_of_a_model(row: Architecture) -> None:
    """Each part is there and of exactly the class that the row names; each class goes by its object."""
    model, stock = tiny(row), import_module(row.module)
    parts = list(swap.parts_of(model, stock, row))
    optional = {part.path for part in row.parts if part.optional}
    assert {name.replace("layers.0", "layers.*") for name, _, _ in parts if "layers.1" not in name} == {
        part.path for part in row.parts
    } - (optional - {"rotary_emb"})
    for name, module, expected in parts:
        assert module is model.get_submodule(name)
        assert type(module) is expected
        assert row_of(expected, (QWEN2, QWEN3)) == (row, roles_by_class(row)[expected])
    norms = {name for name, module in model.named_modules() if type(module) in roles_by_class(row) and "norm" in name}
    assert norms == {name for name, _, expected in parts if roles_by_class(row)[expected] == "norm"}
    assert model.get_submodule(row.final_norm()) is model.norm


def test_classes_of_the_same_name_are_other_classes() -> None:
    """transformers' vision models have had a Qwen2RMSNorm of their own: by its name it would pass for this one."""
    stock = import_module(QWEN2.module)
    namesake = type("Qwen2RMSNorm", (nn.Module,), {"__module__": "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"})
    assert row_of(namesake) is None
    assert row_of(stock.Qwen2RMSNorm) == (QWEN2, "norm")
    assert row_of(type("Derived", (stock.Qwen2MLP,), {})) == (QWEN2, "mlp")


def fired(row: Architecture, monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[str, Tensor]], dict[str, Tensor]]:
    """The sites of the first layer with their tensors, as a stock forward computes them, and the linears' inputs."""
    seen: list[tuple[str, Tensor]] = []
    inputs: dict[str, Tensor] = {}

    def watch(site: Site, module: nn.Module) -> None:
        if site.is_input:
            module.register_forward_pre_hook(lambda _, args: seen.append((site.name, args[0].clone())))
        else:
            module.register_forward_hook(
                lambda _, args, output: seen.append(
                    (site.name, (output[0] if isinstance(output, tuple) else output).clone())
                )
            )

    def note_input(name: str, linear: nn.Module) -> None:
        linear.register_forward_pre_hook(lambda _, args: inputs.update({name: args[0].clone()}))

    stock = import_module(row.module)
    eager, unhooked = stock.eager_attention_forward, [site for site in row.sites if site.module is None]

    def attend(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module is layer.self_attn:
            seen.extend((site.name, query) for site in unhooked)  # rotated queries, and the scores made of them
        return eager(module, query, *args, **kwargs)

    model = tiny(row)
    layer = model.layers[0]
    monkeypatch.setattr(stock, "eager_attention_forward", attend)
    for linear in row.linears:
        note_input(linear.name, layer.get_submodule(linear.name))
    for site in row.sites:
        if site.module is not None:
            watch(site, layer.get_submodule(site.module))
    with torch.no_grad():
        model(input_ids=torch.arange(TOKENS)[None])
    return seen, inputs


@BOTH
def test_every_site_fires_once_and_in_order(row: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan sorts by the row's order and names the first site that is not finite: out of order, it names another."""
    seen, _ = fired(row, monkeypatch)
    assert [name for name, _ in seen] == [site.name for site in row.sites]


@BOTH
def test_a_linear_reads_and_writes_the_sites_of_the_row(row: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `reads` the bounds find the norm in front of a linear; another norm's gain would prove nothing."""
    seen, inputs = fired(row, monkeypatch)
    tensors = dict(seen)
    sizes = {"hidden": SHAPE.hidden, "queries": HEADS * SHAPE.head_dim, "keys": KEY_HEADS * SHAPE.head_dim}
    sizes |= {"intermediate": INTERMEDIATE}
    for linear in row.linears:
        assert torch.equal(inputs[linear.name], tensors[linear.reads])
        assert inputs[linear.name].shape == (1, TOKENS, sizes[linear.columns])
        assert tensors[linear.writes].shape == (1, TOKENS, sizes[linear.rows])


@BOTH
def test_sites_and_linears_agree(row: Architecture) -> None:
    """`writes` and `at` agree, no two sites are one tensor, and each norm has a site with its gain."""
    for linear in row.linears:
        assert row.site(linear.writes).at == f"{linear.name}:output"
        assert row.linear(linear.writes) == linear
        assert linear in row.fed_by(linear.reads)
    places = [site.at for site in row.sites if site.at is not None]
    assert len(places) == len({*places})
    outputs = {site.at: site.name for site in row.sites}
    for norm in row.norms():
        assert row.gain(outputs[f"{norm}:output"]) == f"{norm}.weight"
    with pytest.raises(KeyError):
        row.gain("q")


def test_bounds_and_exponents_are_those_of_the_range_plan() -> None:
    """A bound without a limit would be held against nothing; one without an exponent would refuse a checkpoint."""
    bounds = {bound for site in QWEN2.sites for bound in (site.bound, site.stock_bound) if bound}
    assert bounds == {field.name for field in fields(LayerBounds)}
    assert {site.exponent for site in QWEN2.sites if site.exponent} == {*Exponents._fields}
    assert QWEN2.scaled_bounds().keys() == {site.bound for site in QWEN2.sites if site.bound}
    assert QWEN2.scaled_owners() == {"o_proj": "self_attn", "mlp": "mlp"}
    assert (QWEN2.path("attention"), QWEN2.path("mlp")) == ("self_attn", "mlp")


@BOTH
def test_the_heads_of_a_row_are_those_of_a_release(row: Architecture) -> None:
    """Every class that transformers builds around the base model, the weight of its output layer, its Auto class."""
    stock, prefix = import_module(row.module), row.base.removesuffix("Model")
    classes = {name.removeprefix(prefix) for name in vars(stock) if name.startswith(f"{prefix}For")}
    assert classes | {"Model"} == {head.suffix for head in row.heads}
    auto = import_module("transformers.models.auto.modeling_auto")
    for head in row.heads:
        model = tiny(row, head.suffix)
        outer = {name for name in model.state_dict() if name.endswith(".weight") and "." not in name[:-7]}
        assert head.weight in outer or head.weight is None
        found = getattr(auto, head.auto_class)._model_mapping[type(model.config)]
        assert type(model) in (found if isinstance(found, tuple) else (found,))
    assert set(row.output_layers()) == {"lm_head", "score", "qa_outputs"}


@BOTH
def test_attention_takes_its_arguments_in_the_order_of_the_row(row: Architecture) -> None:
    """The adapter turns stock's call into one order, whatever the model's own is and a release calls the cache."""
    attention = getattr(import_module(row.module), row.stock_name("attention"))
    names = list(inspect.signature(attention.forward).parameters)[1:]
    assert names[:4] == list(AttentionCall._fields[:4])
    assert row.arguments("x", "rotation", "mask", "cache", extra=1) == (
        *("x", "rotation", "mask", "cache"),
        {"extra": 1},
    )
    for old_name in ("past_key_value", "past_key_values"):
        assert row.arguments("x", "rotation", **{old_name: "cache"}).cache == "cache"


def test_a_row_adapts_arguments_in_another_order() -> None:
    def mask_second(hidden_states: Any, attention_mask: Any = None, *rest: Any, **named: Any) -> AttentionCall:
        return qwen2_arguments(hidden_states, named.pop("position_embeddings"), attention_mask, *rest, **named)

    adapted = QWEN2._replace(arguments=mask_second)
    found = adapted.arguments("x", "mask", "cache", position_embeddings="rotation")
    assert found == ("x", "rotation", "mask", "cache", {})


def test_a_row_patches_nothing() -> None:
    """Reading Qwen3's row, even of a model, leaves its classes stock; fixing a Qwen2 beside it does as well."""
    assert ROWS == (QWEN2,)
    stock = import_module(QWEN3.module)
    before = {name: thing for name, thing in vars(stock).items() if isinstance(thing, type)}
    model = tiny(QWEN3)
    classes = [type(module) for module in model.modules()]
    list(swap.parts_of(model, stock, QWEN3))
    qwen2_fp16_fix.fix(tiny(QWEN2).half())
    assert [type(module) for module in model.modules()] == classes
    assert {name: thing for name, thing in vars(stock).items() if isinstance(thing, type)} == before
    assert not any(row_of(kind) for kind in classes)
