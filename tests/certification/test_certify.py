"""The certificate: what it proves, what it reads, and what it says of a checkpoint that cannot be read."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import qwen2_fp16_fix
from qwen2_fp16_fix import demo
from qwen2_fp16_fix.certification.casting import casting_losses
from qwen2_fp16_fix.certification.layer import bound_scores
from qwen2_fp16_fix.patches.planning import boundable_weights
from qwen2_fp16_fix.patches.range_bounds import LayerShape
from tests.commands.in_process import run_command
from tests.stress import KINDS, TINY, build

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(TINY, ("swiglu",)).half().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_stress_checkpoints_are_proven(tmp_path: Path) -> None:
    build(TINY, KINDS).half().save_pretrained(tmp_path)
    found = qwen2_fp16_fix.certify(tmp_path)
    assert found.proven, found.verdict
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert not all(layer.stock_proven for layer in found.layers)


def test_the_demo_checkpoint_is_proven() -> None:
    found = qwen2_fp16_fix.certify(demo.CHECKPOINT)
    assert found.proven, found.verdict
    assert found.casting == {}


def test_a_folder_and_its_model_have_the_same_bounds(folder: Path) -> None:
    from_disk = qwen2_fp16_fix.certify(folder)
    model = qwen2_fp16_fix.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float16)
    loaded = qwen2_fp16_fix.certify(model)
    assert loaded.layers == from_disk.layers
    assert loaded.logits == from_disk.logits
    ranges = qwen2_fp16_fix.status(model).model.ranges
    assert [row.mlp for row in ranges] == [layer.exponents["mlp"] for layer in from_disk.layers]


def test_shards_and_single_files_have_the_same_bounds(folder: Path, tmp_path: Path) -> None:
    build(TINY, ("swiglu",)).half().save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    whole = qwen2_fp16_fix.certify(folder).layers
    assert qwen2_fp16_fix.certify(tmp_path / "sharded").layers == whole
    assert qwen2_fp16_fix.certify(folder / "model.safetensors").layers == whole


def test_a_base_model_and_tied_embeddings_are_read(tmp_path: Path) -> None:
    build(TINY, (), tie_word_embeddings=True).half().save_pretrained(tmp_path / "tied")
    assert qwen2_fp16_fix.certify(tmp_path / "tied").proven
    build(TINY, ()).half().model.save_pretrained(tmp_path / "base")
    assert qwen2_fp16_fix.certify(tmp_path / "base").proven


def plant(tensors: dict[str, torch.Tensor]) -> None:
    """A row of 6e4 in gate and up, whose product no exponent brings into range."""
    for name in ("gate", "up"):
        tensors[f"model.layers.2.mlp.{name}_proj.weight"][5] = 6e4


def test_a_planted_weight_flips_the_verdict(folder: Path) -> None:
    """What passes float16 by more bits than the largest exponent has is named, with its layer."""
    edit(folder, plant)
    found = qwen2_fp16_fix.certify(folder)
    assert not found.proven
    assert found.verdict.startswith("Not provable: layer 2: product is bounded by ")
    assert "too large for the largest exponent" in found.verdict
    assert not found.layers[2].stock_proven


def test_a_row_too_large_for_float16_gets_an_exponent(folder: Path) -> None:
    """Stock is not proven there, and the table names the exponents."""
    edit(folder, lambda t: t["model.layers.2.self_attn.q_proj.weight"].__setitem__(5, 6e4))
    found = qwen2_fp16_fix.certify(folder)
    assert found.proven
    layer = found.layers[2]
    assert not layer.stock_proven
    assert layer.exponents["input_norm"] > 0
    assert layer.exponents["rotated"] > 0
    page = io.StringIO()
    Console(file=page, width=200).print(found.details())
    assert f"input_norm {layer.exponents['input_norm']}" in page.getvalue()


def test_a_bias_of_a_query_is_bounded_where_it_is_stored(folder: Path) -> None:
    """A fixed layer adds it in fp32, and scales only what it then rounds; stock stores q with it."""
    edit(folder, lambda t: t["model.layers.2.self_attn.q_proj.bias"].__setitem__(5, 5e4))
    layer = qwen2_fp16_fix.certify(folder).layers[2]
    assert layer.proven
    assert layer.exponents["input_norm"] == 0
    assert layer.bounds["q"] < 1e3 < 4.9e4 < layer.bounds["biased_q"]
    assert layer.stock_headroom_bits["q"] < 0 < layer.headroom_bits["q"]
    assert "value" not in layer.stock_headroom_bits


def test_what_cannot_be_bounded_in_a_model_is_named() -> None:
    import peft

    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):  # PEFT asks transformers for it
        model = peft.get_peft_model(build(TINY, ()).half(), peft.LoraConfig(r=2, target_modules=["up_proj"]))
    found = qwen2_fp16_fix.certify(model)
    assert not found.proven
    assert "up_proj is a Linear, whose weights cannot be bounded here" in found.verdict


def test_the_cast_is_counted_exactly() -> None:
    stored = torch.tensor([1e5, -7e4, 65280, 1e-9, 3e-5, 1.0, 0.0, float("inf")]).bfloat16()
    assert casting_losses(stored) == {"overflow": 2, "flushed": 1, "subnormal": 1, "nonfinite": 1}
    assert not any(casting_losses(stored[3:7].half()).values())


def test_a_weight_that_the_cast_makes_infinite_is_a_reason(folder: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6

    edit(folder, widen)
    found = qwen2_fp16_fix.certify(folder)
    assert not found.proven
    assert found.casting["model.layers.1.mlp.up_proj.weight"]["overflow"] == 1
    assert any("holds numbers over float16's limit of 65,504 (1)" in reason for reason in found.reasons)


def no_such_folder(folder: Path) -> Path:
    return folder / "elsewhere"


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def broken_json(folder: Path) -> Path:
    (folder / "config.json").write_text("{")
    return folder


def half_written(folder: Path) -> Path:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    return folder


def missing_shard(folder: Path) -> Path:
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder


def missing_tensor(folder: Path) -> Path:
    edit(folder, lambda tensors: tensors.pop("model.layers.3.mlp.down_proj.weight"))
    return folder


def wrong_shape(folder: Path) -> Path:
    edit(folder, lambda t: t.update({"model.layers.0.mlp.down_proj.weight": torch.zeros(3, 5).half()}))
    return folder


def pickled(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def adapter(folder: Path) -> Path:
    (folder / "config.json").rename(folder / "adapter_config.json")
    return folder


def gguf(folder: Path) -> Path:
    (folder / "config.json").rename(folder / "model-Q8_0.gguf")
    return folder


BAD = {
    no_such_folder: "there is no",
    empty: "has no config.json",
    adapter: "holds a PEFT adapter: merge it",
    gguf: "holds GGUF files",
    broken_json: "config.json is not valid JSON",
    half_written: "damaged or half written",
    missing_shard: "the shard model-00001-of-00002.safetensors is missing",
    missing_tensor: "no tensor model.layers.3.mlp.down_proj.weight",
    wrong_shape: "model.layers.0.mlp.down_proj.weight has shape [3, 5]",
    pickled: "convert them to safetensors",
}


@pytest.mark.parametrize("damage", BAD, ids=lambda damage: damage.__name__)
def test_bad_input_is_one_sentence(damage: Callable[[Path], Path], folder: Path) -> None:
    with pytest.raises(qwen2_fp16_fix.CheckpointError) as caught:
        qwen2_fp16_fix.certify(damage(folder))
    assert BAD[damage] in str(caught.value)
    assert "\n" not in str(caught.value)


UP = "model.layers.1.mlp.up_proj.weight"
SLIPS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "embedding": (
        lambda t: t["model.embed_tokens.weight"].__setitem__((3, 3), float("nan")),
        "holds NaN or inf",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_what_no_layer_bound_sees_is_a_reason(slip: str, folder: Path) -> None:
    """The first version proved this: it skipped untied embeddings."""
    change, reason = SLIPS[slip]
    edit(folder, change)
    found = qwen2_fp16_fix.certify(folder)
    assert not found.proven
    assert any(reason in text for text in found.reasons), found.reasons
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_quantised_checkpoint_is_not_proven(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert "quantised (gptq)" in qwen2_fp16_fix.certify(folder).verdict


def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_refused(folder: Path) -> None:
    """Releases differ in which of the two they use."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        qwen2_fp16_fix.certify(folder)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert qwen2_fp16_fix.certify(folder).proven


@pytest.mark.parametrize("part", ["model.norm", "lm_head", "model.layers.1.mlp.up_proj"])
def test_a_part_on_the_meta_device_is_named(part: str) -> None:
    model = build(TINY, ()).half()
    model.get_submodule(part).to("meta")
    found = qwen2_fp16_fix.certify(model)
    assert any("is not loaded" in reason for reason in found.reasons), found.verdict


def test_a_bias_no_qwen2_has_is_not_bounded() -> None:
    model = build(TINY, ()).half()
    model.model.layers[1].self_attn.o_proj.bias = torch.nn.Parameter(torch.full((TINY.hidden,), 6e4).half())
    assert "o_proj has a bias" in qwen2_fp16_fix.certify(model).verdict


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", None), ("hidden_size", "big"), ("num_key_value_heads", 3)]
)
def test_a_config_that_is_no_qwen2_is_one_sentence(key: str, value: Any, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match=r"config\.json has"):
        qwen2_fp16_fix.certify(folder)


@pytest.mark.parametrize("name", [UP, "model.norm.weight", "model.layers.0.self_attn.v_proj.bias"])
def test_shapes_that_would_broadcast_are_refused(name: str, folder: Path) -> None:
    edit(folder, lambda t: t.update({name: t[name][:1].contiguous()}))
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="has shape"):
        qwen2_fp16_fix.certify(folder)


@pytest.mark.parametrize("command", ["certify", "scan", "export", "verify"])
@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("vocab_size", TINY.vocab + 2, "embed_tokens.weight has shape"),
        ("vocab_size", None, "config.json has vocab_size = None"),
        ("vocab_size", "many", "config.json has vocab_size = 'many'"),
        ("intermediate_size", 2 * TINY.intermediate, "_proj.weight has shape"),
        ("architectures", 5, "config.json has architectures = 5, not a list of names"),
        ("architectures", [["Qwen2ForCausalLM"]], "not a list of names"),
        ("rms_norm_eps", "x", "config.json has rms_norm_eps = 'x'"),
        ("rope_theta", -1, "config.json has rope_theta = -1"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "x"}, "config.json has rope_theta = 'x'"),
    ],
)
def test_a_config_of_other_weights_is_refused_by_every_command(
    command: str, key: str, value: Any, sentence: str, folder: Path
) -> None:
    """certify and export called such a folder good, and scan ended in a traceback of torch's."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    arguments: dict[str, tuple[Any, ...]] = {"scan": (folder, [[1, 2]]), "export": (folder, folder.parent / "out")}
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match=re.escape(sentence)) as caught:
        getattr(qwen2_fp16_fix, command)(*arguments.get(command, (folder,)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "foo"),
        ("hidden_act", 5),
        ("layer_types", ["bad"]),
        ("rope_scaling", {"rope_type": "nonsense", "factor": 2.0}),
    ],
)
def test_a_config_that_transformers_trips_over_is_one_sentence(key: str, value: Any, folder: Path) -> None:
    """A scan builds its model itself, and let through what transformers raised."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value} | {"rope_parameters": None}))
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="transformers builds no model") as caught:
        qwen2_fp16_fix.scan(folder, [[1, 2]])
    assert "\n" not in str(caught.value)


def test_another_architecture_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(qwen2_fp16_fix.NotQwen2Error, match="'llama', not 'qwen2'"):
        qwen2_fp16_fix.certify(folder)
    with pytest.raises(qwen2_fp16_fix.NotQwen2Error):
        qwen2_fp16_fix.certify(torch.nn.Linear(2, 2))


def test_the_command_and_its_exit_codes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From `main` on."""
    code, said, complaint = run_command(monkeypatch, capsys, "certify", str(folder))
    assert (code, "Proven: " in said) == (0, True), complaint
    edit(folder, plant)
    code, said, _ = run_command(monkeypatch, capsys, "certify", str(folder), "--json")
    assert (code, json.loads(said)["proven"]) == (1, False)
    code, _, complaint = run_command(monkeypatch, capsys, "certify", str(folder / "elsewhere"))
    assert (code, complaint.startswith("qwen2-fp16-fix: there is no")) == (2, True)


GROWTH = """
import os, re, sys, qwen2_fp16_fix
certify = qwen2_fp16_fix.certify  # imports what it needs
for folder in sys.argv[1:]:
    if os.fork() == 0:
        assert certify(folder).proven
        found = open("/proc/self/status").read()  # ru_maxrss would count the parent's, too
        print(re.search(r"VmHWM:\\s*(\\d+)", found)[1], flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of the peak")
def test_memory_is_about_one_layer(tmp_path: Path) -> None:
    """A layer here is 25 MB; four more of them in a model would be 100 MB."""
    from dataclasses import replace

    shape = replace(TINY, hidden=1024, heads=8, kv_heads=2, intermediate=3072)
    folders = [str(tmp_path / str(layers)) for layers in (2, 6)]
    for layers, folder in zip((2, 6), folders, strict=True):
        build(replace(shape, layers=layers), ()).half().save_pretrained(folder, max_shard_size="30MB")
    command = [sys.executable, "-c", GROWTH, *folders]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    small, large = (int(peak) / 1024 for peak in done.stdout.split())
    assert large - small < 50  # MB: half of what the layers would add


def test_the_final_norm_is_bounded(folder: Path) -> None:
    """A gain that no row of the head looks at: the norm overflows by itself, and 0 · inf is NaN."""

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][1] = 6e4
        tensors["lm_head.weight"][:, 1] = 0

    edit(folder, grow)
    assert qwen2_fp16_fix.certify(folder).verdict.startswith("Not provable: the final norm is bounded by ")


def test_stock_scores_are_bounded_and_the_bound_is_near() -> None:
    """Against the input that is worst for one head's own Gram matrices, and a model with the score disease."""
    layer = build(TINY, ()).half().model.layers[0]
    weights = boundable_weights(layer)
    assert weights is not None
    shape = LayerShape(TINY.hidden, TINY.heads, TINY.kv_heads, TINY.head_dim, positions=256)
    bound = bound_scores(weights, shape)
    hidden = torch.randn(4096, TINY.hidden, dtype=torch.float64)
    hidden *= weights["input_layernorm.weight"].double() * TINY.hidden**0.5 / hidden.norm(dim=1, keepdim=True)
    q, k = (
        (hidden @ weights[f"self_attn.{name}_proj.weight"].double().T + weights[f"self_attn.{name}_proj.bias"].double())
        .view(len(hidden), -1, TINY.head_dim)
        .transpose(0, 1)
        for name in ("q", "k")
    )
    scores = q @ k.repeat_interleave(TINY.heads // TINY.kv_heads, 0).transpose(1, 2)
    assert bound / 16 < float(scores.abs().max()) <= bound
    spiked = qwen2_fp16_fix.certify(build(TINY, ("scores",)).half())
    assert min(layer.stock_headroom_bits["scores"] for layer in spiked.layers) < 0


def test_a_layer_that_keeps_older_exponents_stays_unproven() -> None:
    """The second look found no plan and certified exponents that the layer does not have."""
    model = qwen2_fp16_fix.fix(build(TINY, ()).half())
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(30000)
    for _ in range(2):
        found = qwen2_fp16_fix.certify(model)
        assert not found.proven
        assert found.reasons[0].startswith("layer 1: its exponents were planned for other weights")
    assert qwen2_fp16_fix.certify(qwen2_fp16_fix.fix(model)).proven
