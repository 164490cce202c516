"""Models, checkpoints, texts and settings that verify takes, and those that it refuses in one sentence."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen2_fp16_fix
from qwen2_fp16_fix.checkpoints.loading import load
from qwen2_fp16_fix.files.packaged import DEMO_CHECKPOINT
from tests.stress import TINY, build
from tests.verification.letters import TEXT, table, tokenizer


@pytest.mark.usefixtures("few_rows")
def test_a_loaded_model_is_verified(checkpoint: Path) -> None:
    """Its rows are those of its folder, also when it is fixed, and it stays as it was."""
    model = load(checkpoint, True, torch.float16, "sdpa")
    found = table(model)
    assert [row.perplexity for row in found.rows] == [row.perplexity for row in table(checkpoint).rows]
    assert found.checkpoint == "Qwen2ForCausalLM"
    assert qwen2_fp16_fix.status(model).model.fixed
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="has no tokenizer: pass tokenizer="):
        qwen2_fp16_fix.verify(model, TEXT)
    model.generation_config.temperature = 0.1  # with do_sample=False, which transformers refuses to save
    model.generation_config.do_sample = False
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="transformers cannot save this model"):
        table(model)


def test_models_that_a_folder_would_not_hold_are_refused(checkpoint: Path) -> None:
    import peft

    model = build(TINY, ()).half()
    with pytest.raises(qwen2_fp16_fix.NotQwen2Error, match="this is a Qwen2Model"):
        table(model.model)
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="up_proj is a Sequential"):
        table(model)
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="is quantised"):
        table(model)
    with torch.device("meta"):
        empty = type(model)(build(TINY, ()).config)
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="not loaded"):
        table(empty)
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):  # PEFT asks transformers for it
        wrapped = peft.get_peft_model(build(TINY, ()).half(), peft.LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="has a PEFT adapter"):
        table(wrapped)


def test_a_model_that_transformers_cannot_run_is_the_checkpoints_fault(checkpoint: Path) -> None:
    """It is built without a word, with tables of another width than its heads."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 1.0, "partial_rotary_factor": 0.5}
    (checkpoint / "config.json").write_text(json.dumps(config))
    for command in (table, lambda folder: qwen2_fp16_fix.scan(folder, [[1, 2, 3]])):
        with pytest.raises(qwen2_fp16_fix.CheckpointError, match="transformers cannot run a model by this config"):
            command(checkpoint)


def damage(folder: Path, name: str) -> None:
    """Takes one tensor out of a checkpoint, which transformers would fill with random numbers, without a word here."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


BAD_FOLDERS: dict[str, Callable[[Path], Any]] = {
    "has no config.json": lambda f: (f / "config.json").unlink(),
    "of type 'llama', not 'qwen2'": lambda f: edit_config(f, model_type="llama"),
    "is quantised": lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}),
    "holds a PEFT adapter": lambda f: (f / "adapter_config.json").write_text("{}"),
    "has no tensor lm_head.weight": lambda f: damage(f, "lm_head.weight"),
    "has no tensor model.layers.3.mlp.up_proj": lambda f: damage(f, "model.layers.3.mlp.up_proj.weight"),
    "is damaged or half written": lambda f: (f / "model.safetensors").write_bytes(b"12345678901"),
    "gate_proj.weight has shape": lambda f: edit_config(f, intermediate_size=128),
    "rope_theta = 'x', not a finite number": lambda f: edit_config(f, rope_theta="x"),
    "vocab_size = None, not a whole number": lambda f: edit_config(f, vocab_size=None),
    "transformers cannot load": lambda f: edit_config(f, hidden_act="foo"),
}


@pytest.mark.parametrize("sentence", BAD_FOLDERS)
def test_a_bad_checkpoint_is_one_sentence(checkpoint: Path, sentence: str) -> None:
    BAD_FOLDERS[sentence](checkpoint)
    with pytest.raises((qwen2_fp16_fix.CheckpointError, qwen2_fp16_fix.NotQwen2Error)) as caught:
        table(checkpoint)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_SHARDS: dict[str, Callable[[Path], Any]] = {
    "is missing: the download is unfinished": lambda shard: shard.unlink(),
    "is damaged or half written": lambda shard: shard.write_bytes(shard.read_bytes()[:-100]),
    "of-00007.safetensors: one file is another's": lambda shard: shard.write_bytes(
        sorted(shard.parent.glob("*.safetensors"))[0].read_bytes()
    ),
}


@pytest.mark.parametrize("sentence", BAD_SHARDS)
def test_a_bad_shard_is_one_sentence(tmp_path: Path, sentence: str) -> None:
    build(TINY, ()).half().save_pretrained(tmp_path, max_shard_size="200KB")
    BAD_SHARDS[sentence](sorted(tmp_path.glob("*.safetensors"))[-1])
    with pytest.raises(qwen2_fp16_fix.CheckpointError) as caught:
        table(tmp_path)
    assert sentence in str(caught.value)


def test_a_checkpoint_that_is_nan_in_fp32_is_named(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        qwen2_fp16_fix.CheckpointError, match="first in layer 1, down_proj output: the checkpoint is br"
    ):
        table(checkpoint)


def test_bad_texts_and_tokenizers_are_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    refused = qwen2_fp16_fix.VerificationError
    with pytest.raises(refused, match=r"text.txt cannot be read \(No such file"):
        qwen2_fp16_fix.verify(DEMO_CHECKPOINT, file)
    file.write_bytes(b"caf\xe9")
    with pytest.raises(refused, match="is not UTF-8"):
        qwen2_fp16_fix.verify(DEMO_CHECKPOINT, file)
    file.write_text(" \n")
    with pytest.raises(refused, match=r"text\.txt is empty"):
        qwen2_fp16_fix.verify(DEMO_CHECKPOINT, file)
    with pytest.raises(refused, match="a single token"):
        qwen2_fp16_fix.verify(checkpoint, "x", tokenizer=tokenizer)
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match=r"has no tokenizer: copy tokenizer\.json"):
        qwen2_fp16_fix.verify(checkpoint, TEXT)
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="cannot be loaded"):
        qwen2_fp16_fix.verify(checkpoint, TEXT)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).write_bytes((DEMO_CHECKPOINT / name).read_bytes())
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="vocabulary ends at 127: it is another model's tokenizer"):
        qwen2_fp16_fix.verify(checkpoint, "And the LORD said unto Moses,")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"window": 4097}, "a window of 4097 tokens does not fit: give 2 to 4096"),
        ({"window": 1}, "a window of 1 tokens"),
        ({"stride": 24}, "a stride of 24 does not fit a window of 24: give 1 to 23"),
        ({"stride": 0}, "a stride of 0"),
        ({"tokens": 1}, "1 tokens are too few: give at least 2"),
        ({"device": "tpu"}, "'tpu' is not a device to verify on"),
        ({"device": "cuda:99"}, "there is no cuda:99 here"),
        ({"max_kl": math.nan}, "a threshold of nan decides nothing"),
        ({"max_ppl_drift": -1.0}, "a threshold of -1.0 decides nothing"),
    ],
)
def test_bad_settings_are_one_sentence(checkpoint: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(qwen2_fp16_fix.VerificationError, match=sentence):
        table(checkpoint, **options)
