"""What is saved while registered is what stock saves; a pickle names our files."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import qwen2_fp16_fix


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_everything(kind: Any, folder: Path, out: Path) -> None:
    """Checkpoint, adapters with and without a task, a prompt, and what training writes."""
    import peft

    model = kind.from_pretrained(folder, dtype=torch.float16)
    model.save_pretrained(out / "model")
    model.generation_config.save_pretrained(out / "generation")
    for name, thing in (("config", model.config), ("generation", model.generation_config)):
        (out / f"{name}.pickle").write_bytes(pickle.dumps(thing))
    torch.save(model.state_dict(), out / "state.pt")
    for task in (None, "CAUSAL_LM"):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type=task)
        inner = kind.from_pretrained(folder, dtype=torch.float16)
        peft.get_peft_model(inner, lora).save_pretrained(out / f"lora-{task}")
    optimiser = torch.optim.AdamW(model.parameters())
    torch.save(optimiser.state_dict(), out / "optimizer.pt")
    arguments = transformers.TrainingArguments(output_dir=str(out / "trainer"), report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model, arguments)
    trainer.save_model(out / "trainer")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks transformers for it
def test_nothing_of_ours_is_in_a_saved_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT wrote `parent_library: qwen2_fp16_fix.patches…`, and then refused to load the adapter."""
    from transformers import trainer_utils

    monkeypatch.setattr(trainer_utils.time, "time", lambda: 0.0, raising=False)
    save_everything(AutoModelForCausalLM, folder, make(tmp_path / "stock"))
    with qwen2_fp16_fix.registered():
        assert qwen2_fp16_fix.is_fixed(AutoModelForCausalLM.from_pretrained(folder))
        save_everything(AutoModelForCausalLM, folder, make(tmp_path / "ours"))
    stock, ours = files_of(tmp_path / "stock"), files_of(tmp_path / "ours")
    assert stock.keys() == ours.keys()
    assert not [name for name, content in ours.items() if b"qwen2_fp16_fix" in content]
    differing = [name for name in stock if stock[name] != ours[name] and not name.endswith("training_args.bin")]
    assert not differing  # training arguments hold the time and the machine's name


def make(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("registered", [True, False])
def test_an_adapter_without_a_task_loads_again(registered: bool, folder: Path, tmp_path: Path) -> None:
    import peft

    with qwen2_fp16_fix.registered():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    if registered:
        qwen2_fp16_fix.register()
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path)
    assert qwen2_fp16_fix.is_fixed(loaded) is registered


def test_a_pickle_names_our_files(source: Any) -> None:
    """So that a process without the fix says so, in place of building a stock model."""
    written = io.BytesIO()
    torch.save(qwen2_fp16_fix.Qwen2ForCausalLM(source.config), written)
    assert b"qwen2_fp16_fix.patches.modeling_qwen2_fp16" in written.getvalue()
