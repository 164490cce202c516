"""What cannot be fixed ends in one clear sentence, and nothing is left half patched."""

import functools
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.qwen2 import modeling_qwen2

import qwen2_fp16_fix as q
from qwen2_fp16_fix.launch import launcher
from qwen2_fp16_fix.patches import structure, version_map
from qwen2_fp16_fix.patches.modeling_qwen2_fp16 import PARTS, STOCK
from tests.stress import TINY, build, config


def classes_of(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def refuses(error: type[Exception], model: Any, *words: str) -> None:
    """`fix` raises `error` with `words` in its one sentence, and has changed no class."""
    before = classes_of(model) if isinstance(model, nn.Module) else []
    with pytest.raises(error) as caught:
        q.fix(model)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence
    assert not before or classes_of(model) == before


ERRORS = [getattr(q, name) for name in q.__all__ if name.endswith("Error")]


@pytest.mark.parametrize("error", ERRORS)
def test_pipeline_cannot_swallow_our_errors(error: type) -> None:
    """pipeline() catches these four from a registered class and goes on with the stock class."""
    assert not issubclass(error, (OSError, ValueError, TypeError, RuntimeError))
    assert issubclass(error, q.Qwen2FP16FixError)


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), None, "Qwen/Qwen2-7B"], ids=["module", "None", "path"])
def test_what_is_no_qwen2_is_refused(thing: Any) -> None:
    refuses(q.NotQwen2Error, thing, "no Qwen2")


def test_a_llama_is_refused() -> None:
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    refuses(q.NotQwen2Error, llama, "LlamaForCausalLM")


@pytest.mark.filterwarnings("ignore:.*token_id must be")
@pytest.mark.parametrize(("name", "title"), [("Qwen2VL", "Qwen2-VL"), ("Qwen2_5_VL", "Qwen2.5-VL")])
def test_the_models_with_pictures_are_refused_and_the_pages_say_so(name: str, title: str) -> None:
    """The pages said that their text model was covered: it is a class of its own, with rotations of its own."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    rotation = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    tower = {"depth": 1, "num_heads": 2, "embed_dim": 32, "hidden_size": 32, "intermediate_size": 32}
    settings = getattr(transformers, f"{name}Config")(
        text_config=sizes | heads | rotation, vision_config=tower | {"out_hidden_size": 32, "mlp_ratio": 2}
    )
    refuses(q.NotQwen2Error, getattr(transformers, f"{name}ForConditionalGeneration")(settings), "no Qwen2")
    for page in ("README.md", "README.zh-CN.md", "docs/troubleshooting.md", "docs/zh/troubleshooting.md"):
        text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
        said = [part for part in re.split(r"\n\n|\n- ", text) if title in part and "`fix`" in part]
        assert len(said) == 1, page
        assert "`Qwen2Model`" in said[0]


def test_a_norm_replaced_by_another_tool() -> None:
    """As Liger replaces them in a loaded model: modules of a class of its own."""

    class LigerRMSNorm(nn.Module):
        pass

    model = build(TINY, ())
    model.model.layers[2].input_layernorm = LigerRMSNorm()
    refuses(q.PatchConflictError, model, "layers.2.input_layernorm", "LigerRMSNorm", "another tool")


def test_a_subclass_of_a_part_is_refused() -> None:
    """A subclass may override what the fix relies on, as Unsloth's do, and FSDP2 goes by its own."""
    model = build(TINY, ())
    own = type("OwnLayer", (STOCK.Qwen2DecoderLayer,), {"forward": lambda self, hidden_states: hidden_states})
    model.model.layers[2].__class__ = own
    refuses(q.PatchConflictError, model, "layers.2", "OwnLayer")
    model = build(TINY, ())
    model.model.layers[1].__class__ = type("FSDPQwen2DecoderLayer", (STOCK.Qwen2DecoderLayer,), {})
    refuses(q.PatchConflictError, model, "layers.1", "FSDPQwen2DecoderLayer")


@pytest.mark.parametrize("part", ["self_attn", "mlp", "input_layernorm"])
def test_a_forward_bound_to_one_module(part: str) -> None:
    """As Liger and Unsloth patch instances: the class's forward, ours or stock's, would never run."""
    model = build(TINY, ())
    module = getattr(model.model.layers[0], part)

    def fast_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    module.forward = types.MethodType(fast_forward, module)
    refuses(q.PatchConflictError, model, f"layers.0.{part}", "fast_forward")
    status = q.status(model).model
    assert not status.fixed
    assert "fast_forward" in status.problem


def test_a_forward_bound_after_the_fix_shows_in_status() -> None:
    model = q.fix(build(TINY, ()))
    attention = model.model.layers[0].self_attn
    attention.forward = types.MethodType(STOCK.Qwen2Attention.forward, attention)
    assert not q.status(model).model.fixed


@pytest.mark.parametrize("name", ["Qwen2Attention", "Qwen2MLP", "Qwen2Model", "Qwen2ForCausalLM"])
def test_a_forward_patched_on_a_stock_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Unsloth patches: `Qwen2Attention.forward = …` for the whole process, before or after we are imported."""

    def fast_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    model = build(TINY, ())
    monkeypatch.setattr(getattr(STOCK, name), "forward", fast_forward)
    refuses(q.PatchConflictError, model, name, "fast_forward")
    with pytest.raises(q.PatchConflictError):
        q.Qwen2ForCausalLM(config(TINY))


def fast(stock: Any) -> Any:
    def fast_code(*args: Any, **kwargs: Any) -> Any:
        return stock(*args, **kwargs)

    return fast_code


def wrapped(stock: Any) -> Any:
    return functools.wraps(stock)(fast(stock))


PLACES = {
    "forward": (STOCK.Qwen2RMSNorm, "forward"),
    "forward of the MLP": (STOCK.Qwen2MLP, "forward"),
    "rotation": (modeling_qwen2, "apply_rotary_pos_emb"),
    "eager attention": (modeling_qwen2, "eager_attention_forward"),
}


@pytest.mark.parametrize("made", [fast, wrapped])
@pytest.mark.parametrize("place", PLACES)
def test_code_replaced_after_the_fix_is_told_of(place: str, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attribution tool found the norms and MLPs of a fixed model deaf to its rules: its relevances were wrong, and
    our own advice, to fix the model first, had led there."""
    model = q.fix(build(TINY, ()).half())
    ids = torch.tensor([[1, 2, 3]])
    owner, name = PLACES[place]
    with torch.no_grad(), monkeypatch.context() as patch:
        model(ids)
        patch.setattr(owner, name, made(getattr(owner, name)))
        with pytest.warns(q.PatchConflictWarning, match=f"{name} .*fast_code.*switch that tool off"):
            model(ids)
        model(ids)  # and no second warning, which would be an error here
        for found in (q.status(model).model, q.status()):
            assert "fast_code" in found.problem
            assert "fast_code" in found.summary()
        assert not q.is_fixed(model)
        refuses(q.PatchConflictError, build(TINY, ()), "fast_code", "stock_models")
        model.float()(ids)  # stock's forwards run, and so the tool's
    with torch.no_grad():
        model.half()(ids)
    assert q.status(model).model.fixed


@pytest.mark.parametrize("error", ["class", "instance"])
def test_no_error_advises_to_fix_a_model_first(error: str) -> None:
    """A tool that comes after the fix has no effect on the model, or takes the fix out of it."""
    model = build(TINY, ())
    norm = model.model.layers[0].input_layernorm
    if error == "class":
        norm.__class__ = type("ToolsNorm", (nn.Module,), {})
    else:
        norm.forward = lambda hidden: hidden
    with pytest.raises(q.PatchConflictError) as caught:
        q.fix(model)
    assert not re.search(r"\bfirst\b|\bbefore\b", str(caught.value).partition("another tool")[2])


def test_a_class_replaced_in_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Liger patches: `modeling_qwen2.Qwen2RMSNorm = LigerRMSNorm`, so that models built later carry it."""

    class LigerRMSNorm(nn.Module):
        def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
            super().__init__()

    monkeypatch.setattr(modeling_qwen2, "Qwen2RMSNorm", LigerRMSNorm)
    with pytest.raises(q.PatchConflictError, match="LigerRMSNorm"):
        q.Qwen2ForCausalLM(config(TINY))


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config(TINY))
    refuses(q.MetaTensorError, model, "meta device")


def test_a_fault_half_way_rolls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check comes first, but a fault in the exchange itself must not leave half a fix either."""
    model = build(TINY, ()).half()
    before = classes_of(model)

    def on_fixed(self: Any, stock: type) -> None:
        raise MemoryError

    monkeypatch.setattr(PARTS["Qwen2RotaryEmbedding"], "on_fixed", on_fixed)
    with pytest.raises(MemoryError):
        q.fix(model)
    assert classes_of(model) == before


@pytest.mark.parametrize("version", ["4.36.2", "3.0", "not-a-version"])
def test_an_unsupported_release_is_named_with_what_is_supported(version: str) -> None:
    with pytest.raises(q.UnsupportedTransformersError) as caught:
        version_map.range_for(version)
    assert version in str(caught.value)
    assert version_map.SUPPORTED in str(caught.value)


@pytest.mark.parametrize(
    ("version", "module"),
    [("4.37.0", "v4_37"), ("4.46.0rc1", "v4_45"), ("4.53.0.dev0", "v4_53"), ("5.23.0", "v5_4"), ("5.24.0", "v5_24")],
)
def test_pre_releases_count_as_their_release(version: str, module: str) -> None:
    """`4.46.0rc1` is in no specifier range as it stands."""
    assert version_map.range_for(version).module == module


@pytest.mark.process
def test_a_newer_release_is_untested_and_says_so(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    program = """
import transformers.processing_utils  # loads transformers a second time under the same name
import transformers, warnings
transformers.__version__ = "5.99.0"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import qwen2_fp16_fix
    qwen2_fp16_fix.register()
    qwen2_fp16_fix.register()
ours = [w for w in caught if issubclass(w.category, qwen2_fp16_fix.UntestedTransformersWarning)]
found = qwen2_fp16_fix.status()
print(len(ours), "5.99.0" in str(ours[0].message), found.tested, all(found.registered.values()))
"""
    done = python("-c", program)
    assert done.stdout.split() == ["1", "True", "False", "True"], done.stderr


@pytest.mark.process
def test_an_old_release_is_refused_everywhere(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    program = """
import transformers.processing_utils
import transformers
transformers.__version__ = "4.36.2"
import qwen2_fp16_fix as q
for use in (lambda: q.register(), lambda: q.fix(None), lambda: q.Qwen2ForCausalLM):
    try:
        use()
    except q.UnsupportedTransformersError as error:
        print(str(error).startswith("transformers 4.36.2 is installed"))
print(q.status().problem.startswith("transformers 4.36.2"), q.status().patch)
"""
    done = python("-c", program)
    assert done.stdout.split() == ["True"] * 4 + ["None"], done.stderr


def altered(name: str, **attributes: Any) -> types.SimpleNamespace:
    """The stock classes with one of them changed, as a future release might."""
    changed = type(name, (getattr(STOCK, name),), {"__module__": STOCK.__name__, **attributes})
    return types.SimpleNamespace(**{**vars(STOCK), name: changed})


def in_transformers(function: Any) -> Any:
    """The function as if transformers' module had defined it."""
    return types.FunctionType(function.__code__, vars(sys.modules[STOCK.__name__]))


def test_the_installed_source_has_the_known_shape() -> None:
    structure.check_structure(STOCK, PARTS, transformers.__version__)


def test_a_renamed_parameter_is_an_unknown_shape() -> None:
    def forward(
        self: Any, states: Any, position_embeddings: Any, attention_mask: Any, past_key_values: Any
    ) -> None: ...

    with pytest.raises(q.UnsupportedTransformersError, match=r"found Qwen2Attention.forward\(states, "):
        structure.check_structure(altered("Qwen2Attention", forward=in_transformers(forward)), PARTS, "5.99.0")


def test_a_step_that_is_gone_is_an_unknown_shape() -> None:
    def forward(self: Any, hidden_states: Any) -> Any:
        return self.weight * hidden_states

    with pytest.raises(q.UnsupportedTransformersError, match="Qwen2RMSNorm without rsqrt"):
        structure.check_structure(altered("Qwen2RMSNorm", forward=in_transformers(forward)), PARTS, "5.99.0")


def test_a_class_that_is_gone_is_an_unknown_shape() -> None:
    gone = types.SimpleNamespace(**{**vars(STOCK), "Qwen2RotaryEmbedding": None})
    with pytest.raises(q.UnsupportedTransformersError, match="no class Qwen2RotaryEmbedding"):
        structure.check_structure(gone, PARTS, "5.99.0")


def test_paged_eager_attention_is_refused() -> None:
    """transformers' continuous batching has an eager function of its own, with float16 scores."""
    model = q.fix(build(TINY, ("scores",), attn_implementation="eager").half())
    model.config._attn_implementation = "paged|eager"
    with pytest.raises(q.HalfPrecisionScoresError, match=r"paged\|sdpa"), torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))


def test_registering_keeps_transformers_error_for_an_empty_folder(tmp_path: Path) -> None:
    """transformers' own error stands: registering must not turn it into a success or another model."""
    with q.registered(), pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_registration_that_does_not_take_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look-up after registering is what counts, whatever register() returned."""
    from qwen2_fp16_fix.registration import register

    monkeypatch.setattr(register, "is_registered", lambda auto: False)
    with pytest.raises(q.RegistrationError, match="AutoModel"):
        q.register()
    monkeypatch.undo()
    assert not any(q.status().registered.values())


@pytest.mark.parametrize(
    "switches",
    ["-W ignore -I", "-X faulthandler -S", "-Bq -uE", "-OWignore -I", "--check-hash-based-pycs never -S", "-vWX -Sc"],
)
def test_a_switch_that_keeps_the_fix_out_is_found_behind_others(switches: str) -> None:
    """The argument of -W ended the search, and `python -W ignore -I` ran stock Qwen2 without a word."""
    with pytest.raises(launcher.UsageError, match="keeps the fix out"):
        launcher.command_for([sys.executable, *switches.split(), "x.py"])


@pytest.mark.parametrize(
    "arguments",
    [
        *("-Wignore::ImportWarning x.py", "-Werror::SyntaxWarning x.py", "-W Error -u x.py", "-XSIE x.py", "-X E x.py"),
        *("x.py -I", "-cimport.SIE", "-c SIE -I", "-um pytest -S", "-mEIS", "- -I", "-- -I", "-u", "-W"),
        *("--version -b", "--check-hash-based-pycs -S x.py"),
    ],
)
def test_letters_in_arguments_are_no_switches(arguments: str) -> None:
    """`-Wignore::ImportWarning` was refused for its I."""
    assert launcher.command_for([sys.executable, *arguments.split()])[1:] == arguments.split()
