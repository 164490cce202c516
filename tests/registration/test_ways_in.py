"""Every way a program can come by a Qwen2 ends with a fixed model that stays finite; refusals are in test_refusals."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import qwen2_fp16_fix
from qwen2_fp16_fix.patches.modeling_qwen2_fp16 import STOCK
from qwen2_fp16_fix.status_result import PartCount
from tests.stress import TINY, build, random_prompt

PROMPT = random_prompt(TINY, batch=2, length=24)


def stress(attention: str = "eager") -> Any:
    """A stock float16 model that prints `!!!!` in eager and in sdpa."""
    return build(TINY, ("scores", "residual"), attn_implementation=attention).half()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a checkpoint."""
    path = tmp_path_factory.mktemp("checkpoint")
    stress().save_pretrained(path)
    return path


def words() -> Any:
    """A tokenizer that reads w5 as id 5."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(TINY.vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0")


def is_fixed(model: nn.Module) -> bool:
    """By what `status` says and, since it could be wrong, by what the model computes."""
    with torch.no_grad():
        output = model(input_ids=PROMPT)
    found = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return bool(qwen2_fp16_fix.status(model).model.fixed) and bool(torch.isfinite(found).all())


def load(auto: Any, folder: Path, **kwargs: Any) -> Any:
    return auto.from_pretrained(folder, dtype=torch.float16, attn_implementation="eager", **kwargs)


def test_the_stress_model_breaks_stock(folder: Path) -> None:
    """Without this, every test below could pass with the fix off."""
    model = load(AutoModelForCausalLM, folder)
    assert type(model) is STOCK.Qwen2ForCausalLM
    assert not is_fixed(model)
    for attention in ("eager", "sdpa"):
        with torch.no_grad():
            assert not torch.isfinite(stress(attention)(input_ids=PROMPT).logits).all()


def test_registering_fixes_what_auto_classes_load(folder: Path) -> None:
    qwen2_fp16_fix.register()
    assert is_fixed(load(AutoModelForCausalLM, folder))
    assert is_fixed(load(AutoModel, folder))


def test_registered_as_a_context_manager(folder: Path) -> None:
    with qwen2_fp16_fix.registered():
        assert is_fixed(load(AutoModelForCausalLM, folder))
        with qwen2_fp16_fix.registered():
            pass
        assert all(qwen2_fp16_fix.status().registered.values())
    assert not any(qwen2_fp16_fix.status().registered.values())


def test_fix_takes_effect_in_place() -> None:
    model = stress()
    assert qwen2_fp16_fix.fix(model) is model
    assert is_fixed(model)


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # transformers sets it, torch dislikes it
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch's own, on importing flex
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_fused_backends_stay_chosen_and_finite(attention: str) -> None:
    model = qwen2_fp16_fix.fix(stress(attention))
    assert is_fixed(model)
    assert qwen2_fp16_fix.status(model).model.attention == attention


def test_shapes_can_be_asked_of_a_model_without_weights() -> None:
    """Memory estimators and graph tools run a model on the meta device, which autocast does not know."""
    model = qwen2_fp16_fix.fix(stress()).to("meta")
    assert model(input_ids=PROMPT.to("meta")).logits.shape == (*PROMPT.shape, TINY.vocab)


def test_drop_in_classes_load_fixed(folder: Path) -> None:
    assert is_fixed(load(qwen2_fp16_fix.Qwen2ForCausalLM, folder))
    assert is_fixed(load(qwen2_fp16_fix.Qwen2Model, folder))


@pytest.mark.process
def test_importing_auto_registers(folder: Path, python: Callable[..., Any]) -> None:
    program = f"""
import qwen2_fp16_fix.auto, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype=torch.float16)
print(qwen2_fp16_fix.status(model).model.fixed)
"""
    done = python("-c", program)
    assert done.stdout.strip() == "True", done.stderr


def test_a_pipeline_is_fixed(folder: Path) -> None:
    """pipeline() falls back to the stock class where a registered one raises one of four builtin errors."""
    qwen2_fp16_fix.register()
    pipe = transformers.pipeline(
        "text-generation",
        model=str(folder),
        tokenizer=words(),
        dtype=torch.float16,
        model_kwargs={"attn_implementation": "eager"},
    )
    assert is_fixed(pipe.model)
    text = pipe("w5 w7 w9", max_new_tokens=4, do_sample=False, pad_token_id=0)[0]["generated_text"]
    assert text.startswith("w5 w7 w9")
    assert "w0" not in text  # id 0, which NaN logits would choose


class TwoTowerConfig(PretrainedConfig):
    model_type = "two_tower"
    sub_configs: ClassVar = {"text_config": AutoConfig}

    def __init__(self, text_config: Any = None, **kwargs: Any) -> None:
        self.text_config = transformers.Qwen2Config(**text_config) if isinstance(text_config, dict) else text_config
        super().__init__(**kwargs)


class TwoTower(PreTrainedModel):
    """A multimodal model in miniature: its text tower is whatever AutoModel builds."""

    config_class = TwoTowerConfig

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__(config)
        self.text = AutoModel.from_config(config.text_config)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.text(input_ids=input_ids)


def test_auto_model_inside_another_model() -> None:
    """LLaVA and its like build their text model through AutoModel, never through AutoModelForCausalLM."""
    source = stress()
    with qwen2_fp16_fix.registered():
        tower = TwoTower(TwoTowerConfig(text_config=source.config.to_dict())).half().eval()
    assert type(tower.text) is qwen2_fp16_fix.Qwen2Model
    tower.text.load_state_dict(source.model.state_dict())
    tower.text.set_attn_implementation("eager")
    assert is_fixed(tower)


def test_fix_reaches_a_qwen2_inside_another_model() -> None:
    tower = TwoTower(TwoTowerConfig(text_config=stress().config.to_dict()))
    assert qwen2_fp16_fix.status(qwen2_fp16_fix.fix(tower)).model.fixed


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks transformers for it
@pytest.mark.parametrize("before", [True, False], ids=["fixed first", "wrapped first"])
def test_a_peft_model_is_fixed_wrapped_before_or_after(before: bool) -> None:
    """LoRA replaces the projections that the attention calls, not the attention."""
    import peft

    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = qwen2_fp16_fix.fix(stress()) if before else stress()
    wrapped = peft.get_peft_model(model, settings).eval()
    if not before:
        assert qwen2_fp16_fix.fix(wrapped) is wrapped
    assert is_fixed(wrapped)
    assert is_fixed(wrapped.merge_and_unload())


class Int8Linear(nn.Module):
    """Stands for a quantised linear: integer weights, a scale for each row, float16 in and out, no float `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.float().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.float() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, (self.weight.float() * self.scale).to(x.dtype), self.bias)


@pytest.mark.parametrize("before", [True, False], ids=["fixed first", "quantised first"])
def test_a_model_with_quantised_projections_is_fixed(before: bool) -> None:
    """bitsandbytes, GPTQ and AWQ replace linears; the attention and the norms around them stay."""
    model = qwen2_fp16_fix.fix(stress()) if before else stress()
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Int8Linear(child))
    assert is_fixed(qwen2_fp16_fix.fix(model))


def test_a_model_in_data_parallel_is_fixed() -> None:
    wrapped = nn.DataParallel(stress())
    assert is_fixed(qwen2_fp16_fix.fix(wrapped))


@pytest.mark.parametrize("ran_before", [False, True], ids=["not yet run", "already compiled as stock"])
def test_a_compiled_model_is_compiled_anew_by_fix(ran_before: bool) -> None:
    """Code compiled from the stock classes must not go on running after the fix."""
    compiled: Any = torch.compile(stress(), backend="eager")
    if ran_before:
        with torch.no_grad():
            assert not torch.isfinite(compiled(input_ids=PROMPT).logits).all()
    assert is_fixed(qwen2_fp16_fix.fix(compiled))


def test_torch_compile_in_one_graph() -> None:
    """A graph break in a layer is a host round trip a token."""
    model = qwen2_fp16_fix.fix(stress())
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(input_ids=PROMPT, use_cache=False).logits,
            model(input_ids=PROMPT, use_cache=False).logits,
            atol=4e-3,  # a float16 step of a logit of 4: a compiler takes addcmul apart and rounds in fp32 once more
            rtol=0,
        )


@pytest.mark.parametrize("registered", [True, False], ids=["registered", "fixed after loading"])
def test_a_model_dispatched_by_a_device_map_is_fixed(folder: Path, registered: bool) -> None:
    """accelerate keeps the forward it hooked: one kept from the stock class would go on running."""
    from accelerate import dispatch_model

    if registered:
        qwen2_fp16_fix.register()
    model = load(AutoModelForCausalLM, folder)
    places: dict[str, Any] = {"": "cpu"}
    offload = {f"model.layers.{i}": "disk" for i in range(2)}
    rest = {f"model.layers.{i}": "cpu" for i in range(2, TINY.layers)}
    places = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
        **offload,
        **rest,
    }
    model = dispatch_model(
        model, device_map=places, main_device="cpu", offload_dir=str(folder / "offload"), force_hooks=True
    )
    if not registered:
        qwen2_fp16_fix.fix(model)
    assert is_fixed(model)


def test_copies_and_pickles_stay_fixed(tmp_path: Path) -> None:
    model = qwen2_fp16_fix.fix(stress())
    assert is_fixed(copy.deepcopy(model))
    assert is_fixed(pickle.loads(pickle.dumps(model)))


def test_switched_off_by_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """QWEN2_FP16_FIX=0 reaches every way in, and none of them is silent about it."""
    monkeypatch.setenv("QWEN2_FP16_FIX", "0")
    qwen2_fp16_fix.register()
    assert type(load(AutoModelForCausalLM, folder)) is STOCK.Qwen2ForCausalLM
    model = qwen2_fp16_fix.fix(stress())
    assert not qwen2_fp16_fix.status(model).model.fixed
    assert not qwen2_fp16_fix.status(load(qwen2_fp16_fix.Qwen2ForCausalLM, folder)).model.fixed
    assert not qwen2_fp16_fix.status().enabled
    assert sum("QWEN2_FP16_FIX=0" in record.message for record in caplog.records) >= 2


def test_a_status_is_plain_data_too() -> None:
    found = qwen2_fp16_fix.status(qwen2_fp16_fix.fix(stress()))
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert found.model.parts["Qwen2DecoderLayer"] == PartCount(TINY.layers, TINY.layers)
    assert (found.model.dtype, found.model.attention) == ("float16", "eager")
