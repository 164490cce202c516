"""vLLM's Transformers backend reads the source of a model before it runs it: these are the rules it reads by.

Measured with vLLM 0.32.0, which takes transformers 5.16.1 to 5.19. What breaks a rule is refused there, or worse,
replaced by arithmetic that is not ours. The modules are read as text, so each is checked whatever is installed.
"""

import ast
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transformers
from torch import nn

import qwen2_fp16_fix
from qwen2_fp16_fix.demo import CHECKPOINT
from qwen2_fp16_fix.hub.export import PATCHES
from qwen2_fp16_fix.patches import modeling_qwen2_fp16 as patched

TABLE = "ALL_ATTENTION_FUNCTIONS"
#: Whether vLLM would find the attention of a module. It looks into one forward only, and 4.56's look-up is in another
#: function. No vLLM that reads source takes those releases; one that does will say so in an error.
FOUND = {"v4_56": False, "v5_4": True, "v5_24": True}


def source_of(module: str) -> str:
    return (PATCHES / f"{module}.py").read_text()


def forward_in(text: str, owner: str) -> ast.FunctionDef:
    """The forward of a class, as vLLM sees it: without what it inherits."""
    found = next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == owner)
    return next(node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "forward")


def is_own(node: ast.AST | None, name: str | None = None) -> bool:
    """Whether a node is `self.<name>`."""
    named = isinstance(node, ast.Attribute) and name in (None, node.attr)
    return named and isinstance(node.value, ast.Name) and node.value.id == "self"  # type: ignore[union-attr]


def own_call(node: ast.AST, name: str) -> ast.Call | None:
    """The node if it is `self.<name>(…)`."""
    return node if isinstance(node, ast.Call) and is_own(node.func, name) else None


def is_lookup(node: ast.AST | None) -> bool:
    """`ALL_ATTENTION_FUNCTIONS[…]` or `ALL_ATTENTION_FUNCTIONS.get_interface(…)`, by that name and no other."""
    node = node.func if isinstance(node, ast.Call) else node
    within = isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.value, ast.Name)
    return within and node.value.id == TABLE  # type: ignore[union-attr]


def interface_calls(forward: ast.FunctionDef) -> list[ast.Call]:
    """Calls of a local that was looked up in transformers' table."""
    assigned = [node for node in ast.walk(forward) if isinstance(node, ast.Assign) and is_lookup(node.value)]
    names = {target.id for node in assigned for target in node.targets if isinstance(target, ast.Name)}
    calls = [node for node in ast.walk(forward) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [call for call in calls if call.func.id in names]  # type: ignore[attr-defined]


def broken_by_attention(text: str) -> Iterator[str]:
    forward = forward_in(text, "Attention")
    calls = interface_calls(forward)
    if len(calls) != 1:
        yield "one call"
        return
    scaling = [keyword.value for keyword in calls[0].keywords if keyword.arg == "scaling"]
    if len(scaling) != 1 or not (isinstance(scaling[0], ast.Constant) or is_own(scaling[0])):
        yield "scaling"
    handed_on = [keyword.value.id for keyword in calls[0].keywords if keyword.arg is None]  # type: ignore[attr-defined]
    if forward.args.kwarg is None or forward.args.kwarg.arg not in handed_on:
        yield "kwargs"


def broken_by_norm(text: str) -> Iterator[str]:
    arguments = forward_in(text, "RMSNorm").args
    if len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]) < 3:  # self and two: one is a pattern
        yield "second parameter"


def broken_by_layer(text: str) -> Iterator[str]:
    forward = forward_in(text, "DecoderLayer")
    handed_on = {
        keyword.value.id
        for node in ast.walk(forward)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg is None and isinstance(keyword.value, ast.Name)
    }
    if forward.args.kwarg is None or forward.args.kwarg.arg not in handed_on:
        yield "kwargs"


def broken_by_mlp(text: str) -> Iterator[str]:
    """`act(gate(x)) * up(x)` in one expression: rewritten to one kernel, whose product is float16."""
    for node in ast.walk(forward_in(text, "MLP")):
        sides = [node.left, node.right] if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) else []
        activated = [call for side in sides if (call := own_call(side, "act_fn")) is not None]
        if any(own_call(side, "up_proj") for side in sides) and any(
            own_call(call.args[0], "gate_proj") for call in activated
        ):
            yield "fused product"


RULES: dict[str, Callable[[str], Iterator[str]]] = {
    "Qwen2Attention": broken_by_attention,
    "Qwen2RMSNorm": broken_by_norm,
    "Qwen2DecoderLayer": broken_by_layer,
    "Qwen2MLP": broken_by_mlp,
}


@pytest.mark.parametrize("module", FOUND)
def test_vllm_finds_the_attention_of_the_releases_it_takes(module: str) -> None:
    """Refused otherwise: "Layer 0 does not dispatch through the Transformers attention interface"."""
    assert list(broken_by_attention(source_of(module))) == ([] if FOUND[module] else ["one call"])


@pytest.mark.parametrize("part", ["Qwen2RMSNorm", "Qwen2DecoderLayer", "Qwen2MLP"])
def test_vllm_replaces_no_part(part: str) -> None:
    """Its own norm would hand the fp32 residual on unrounded; its own product overflows."""
    assert list(RULES[part](source_of("blocks"))) == []


@pytest.mark.parametrize("module", FOUND)
def test_no_release_has_parts_of_its_own_but_the_attention(module: str) -> None:
    """What is read of `blocks` holds for every release only while they all take it from there."""
    names = {node.name for node in ast.parse(source_of(module)).body if isinstance(node, ast.ClassDef)}
    assert names == {"Attention"}
    assert '{**COMMON_PARTS, "Qwen2Attention": Attention}' in source_of(module)


@pytest.mark.parametrize("part", RULES)
def test_the_source_of_what_is_installed_is_what_was_read(part: str) -> None:
    """vLLM takes the source from the class: code that was built by `exec`, or wrapped, has none or another."""
    file = patched.RANGE.module if part == "Qwen2Attention" else "blocks"
    forward = inspect.unwrap(getattr(patched, part).forward)
    assert Path(inspect.getsourcefile(forward) or "").stem == file
    assert inspect.getsource(forward) in source_of(file)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """What an engine builds: AutoModel's class, with weights still to come."""
    config = transformers.AutoConfig.from_pretrained(CHECKPOINT)
    built: nn.Module = next(m for m in patched.REMOTE if m.__name__ == "Qwen2FP16Model")(config)
    return built


def test_every_layer_says_which_it_is_and_how_it_scales(model: nn.Module) -> None:
    """vLLM hangs its attention on the layer by `layer_idx`, and takes `is_causal=False` for an encoder."""
    attentions = [module for module in model.modules() if type(module).__name__ == "Qwen2Attention"]
    assert [type(attention.layer_idx) for attention in attentions] == [int] * len(attentions) != []
    assert [attention.layer_idx for attention in attentions] == [*range(len(attentions))]
    assert all(attention.is_causal for attention in attentions)
    if hasattr(transformers.modeling_utils, TABLE):
        assert all(isinstance(attention.scaling, float) for attention in attentions)


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_leads_to_the_fixed_model(strict: bool, tmp_path: Path) -> None:
    """vLLM runs its own Qwen2 by a stock architecture, and stock's where `auto_map` has no AutoModel: both NaN."""
    out = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out", weights="none", strict=strict)
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"]["AutoModel"].partition(".")[2] in {model.__name__ for model in patched.REMOTE}
    assert not {*config["architectures"]} & {*dir(transformers)}
    assert config["architectures"]


INTERFACE = "ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_attention)"
PRODUCT = "self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)"
BREAKS = [
    ("Qwen2Attention", INTERFACE, INTERFACE.replace("ALL_", "THE_"), "one call"),
    ("Qwen2Attention", INTERFACE, "eager_attention", "one call"),
    ("Qwen2Attention", "output, weights = attend(", "attend(self)\n        output, weights = attend(", "one call"),
    ("Qwen2Attention", f"attend = {INTERFACE}", f"self.attend = {INTERFACE}", "one call"),
    ("Qwen2Attention", "scaling=self.score_scaling", "scaling=self.head_dim**-0.5", "scaling"),
    ("Qwen2Attention", "scaling=self.score_scaling,", "", "scaling"),
    ("Qwen2Attention", "sliding_window=self.sliding_window,\n            **kwargs,", "", "kwargs"),
    ("Qwen2RMSNorm", ", out_dtype: torch.dtype | None = None", "", "second parameter"),
    (
        "Qwen2DecoderLayer",
        "promote_residual(hidden_states), *args, **kwargs)",
        "promote_residual(hidden_states), *args)",
        "kwargs",
    ),
    ("Qwen2MLP", "torch.mul(gate, up, out=memory)", PRODUCT, "fused product"),
    ("Qwen2MLP", "torch.mul(gate, up, out=memory)", " * ".join(reversed(PRODUCT.split(" * "))), "fused product"),
]


@pytest.mark.parametrize(("part", "line", "instead", "rule"), BREAKS)
def test_each_rule_is_seen_to_break(part: str, line: str, instead: str, rule: str) -> None:
    """A reader that finds nothing in a broken copy would find nothing in a broken release."""
    modules = [module for module in FOUND if FOUND[module]] if part == "Qwen2Attention" else ["blocks"]
    for text in map(source_of, modules):
        assert text.count(line) == 1
        assert list(RULES[part](text.replace(line, instead))) == [rule]
