"""An exported folder holds the fix, the weights and what belongs to the model."""

import errno
import functools
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import qwen2_fp16_fix
from qwen2_fp16_fix.checkpoints import loading
from qwen2_fp16_fix.checkpoints.folder import open_checkpoint
from qwen2_fp16_fix.cli import commands
from qwen2_fp16_fix.demo import CHECKPOINT
from qwen2_fp16_fix.errors import CheckpointError, ExportError, HubError
from qwen2_fp16_fix.hub import export
from qwen2_fp16_fix.hub.export import CARRIED, CODE_FILES, PATCHES
from tests.hub.examples import SHARDS, change_config, config_of, contents


def test_no_public_name_is_a_module() -> None:
    """A module or room of a function's name takes its place in the package once it is imported."""
    modules = {path.stem for path in Path(qwen2_fp16_fix.__file__).parent.iterdir()}
    assert not modules & set(qwen2_fp16_fix.__all__)


def test_the_entry_file_imports_every_sibling() -> None:
    """As remote code from a local folder, transformers before 5.10 copies what the entry file imports, and no more."""
    entry = (PATCHES / "modeling_qwen2_fp16.py").read_text()
    imported = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", entry, re.M))  # as transformers looks for them
    assert imported == {name.removesuffix(".py") for name in CODE_FILES} - {"__init__", "modeling_qwen2_fp16"}


def test_a_load_reads_few_files() -> None:
    """transformers follows every chain of imports to its end and forgets where it has been: a chain, a file read.

    6,940 chains took 2 seconds at every load. A new file may cost hundreds; `from . import sibling` ends a chain.
    """

    @functools.cache
    def chains(name: str) -> int:
        text = (PATCHES / f"{name}.py").read_text(encoding="utf-8")
        return sum(1 + chains(each) for each in set(re.findall(r"^\s*from\s+\.(\S+)\s+import", text, re.M)))

    assert chains("modeling_qwen2_fp16") < 2000


@pytest.mark.parametrize("strict", [False, True])
def test_the_folder_holds_code_weights_and_tokenizer(strict: bool, tmp_path: Path) -> None:
    out = qwen2_fp16_fix.export(str(CHECKPOINT), str(tmp_path / "out"), strict=strict)
    found, source = contents(out), contents(CHECKPOINT)
    for name in CODE_FILES:
        assert found.pop(name) == (PATCHES / name).read_bytes()
    assert set(found) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "qwen2_fp16_fix.lock.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert qwen2_fp16_fix.check(out / "qwen2_fp16_fix.lock.json", out).passed
    for name in set(found) - {"README.md", "config.json", "qwen2_fp16_fix.lock.json"}:
        assert found[name] == source[name]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_engines_cannot_take_the_export_for_their_own_qwen2(tmp_path: Path) -> None:
    """vLLM runs its native Qwen2 by `architectures`, and stock's AutoModel where `auto_map` has none: both NaN."""
    plain, strict = (
        config_of(qwen2_fp16_fix.export(CHECKPOINT, tmp_path / str(s), weights="none", strict=s)) for s in (False, True)
    )
    assert plain["architectures"] == ["Qwen2FP16ForCausalLM"]
    assert strict["architectures"] == ["Qwen2FP16StrictForCausalLM"]
    assert not {*plain["architectures"], *strict["architectures"]} & {*dir(transformers)}
    assert (plain["model_type"], strict["model_type"]) == ("qwen2", "qwen2_fp16")
    assert "AutoConfig" not in plain["auto_map"]
    assert strict["auto_map"].pop("AutoConfig") == "configuration_qwen2_fp16.Qwen2FP16Config"
    assert set(plain["auto_map"]) == set(strict["auto_map"])
    from qwen2_fp16_fix.patches import modeling_qwen2_fp16

    for auto_map in (plain["auto_map"], strict["auto_map"]):
        assert "AutoModel" in auto_map
        for auto, name in auto_map.items():
            assert getattr(modeling_qwen2_fp16, name.removeprefix("modeling_qwen2_fp16."))._auto_class == auto


def test_weights_are_linked_copied_or_left_out(sharded: Path, tmp_path: Path) -> None:
    def inodes(folder: Path) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}

    linked = qwen2_fp16_fix.export(sharded, tmp_path / "linked")
    copied = qwen2_fp16_fix.export(sharded, tmp_path / "copied", weights="copy")
    without = qwen2_fp16_fix.export(sharded, tmp_path / "without", weights="none")
    assert inodes(linked) == inodes(sharded)
    assert len(inodes(copied)) == SHARDS
    assert not set(inodes(copied).values()) & set(inodes(sharded).values())
    assert contents(linked) == contents(copied)
    assert not list(without.glob("*.safetensors*"))  # an index without its shards would not load
    assert (without / "tokenizer.json").is_file()


def test_where_links_cannot_be_had_weights_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    out = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out")
    assert (out / "model.safetensors").stat().st_ino != (CHECKPOINT / "model.safetensors").stat().st_ino
    assert contents(out)["model.safetensors"] == contents(CHECKPOINT)["model.safetensors"]


def test_what_belongs_to_a_model_is_carried_over(checkpoint: Path, tmp_path: Path) -> None:
    extra = (
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
        "LICENSE",
        "NOTICE",
    )
    for name in extra:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text(name)
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json"):
        (checkpoint / name).write_text(name)
    change_config(checkpoint, _name_or_path="/home/somebody/private")
    out = qwen2_fp16_fix.export(checkpoint, tmp_path / "out")
    assert all((out / name).read_text() == name for name in extra)
    assert not any((out / name).exists() for name in ("optimizer.pt", "training_args.bin", "trainer_state.json"))
    assert "somebody" not in (out / "config.json").read_text() + (out / "README.md").read_text()


def test_a_folder_named_like_a_file_that_is_carried_is_left_out(checkpoint: Path, tmp_path: Path) -> None:
    """A folder LICENSES, as REUSE has it, was called "a link to nothing"."""
    for name in ("LICENSES", "chat_templates", "additional_chat_templates/old"):
        (checkpoint / name).mkdir(parents=True)
        (checkpoint / name / "x.txt").touch()
    out = qwen2_fp16_fix.export(checkpoint, tmp_path / "out", weights="none")
    assert not (out / "LICENSES").exists()
    assert not (out / "additional_chat_templates").exists()


def test_code_can_lie_in_a_repository_of_its_own(tmp_path: Path) -> None:
    out = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out", strict=True, code_repo="some/code@v1.0")
    config, card = config_of(out), (out / "README.md").read_text()
    assert config["auto_map"]["AutoModel"] == "some/code--modeling_qwen2_fp16.Qwen2FP16StrictModel"
    assert config["auto_map"]["AutoConfig"] == "some/code--configuration_qwen2_fp16.Qwen2FP16Config"
    assert not list(out.glob("*.py"))
    assert 'code_revision="v1.0"' in card


def test_an_export_can_be_exported_again(tmp_path: Path) -> None:
    """Into the other sort, too: a fine-tuned remote model is saved as an export."""
    strict = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "strict", strict=True)
    plain = qwen2_fp16_fix.export(strict, tmp_path / "plain")
    direct = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "direct")
    assert config_of(plain) == config_of(direct) | {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize(
    ("head", "weight"), [("Model", None), ("ForTokenClassification", "score"), ("ForQuestionAnswering", "qa_outputs")]
)
def test_other_heads_are_exported_under_their_own_name(head: str, weight: str | None, tmp_path: Path) -> None:
    """And need no lm_head, but their own."""
    from tests.stress import TINY, config

    model = getattr(transformers, f"Qwen2{head}")(config(TINY))
    model.save_pretrained(tmp_path / "checkpoint")
    out = qwen2_fp16_fix.export(tmp_path / "checkpoint", tmp_path / "out")
    assert config_of(out)["architectures"] == [f"Qwen2FP16{head}"]
    if weight:
        change_config(tmp_path / "checkpoint", architectures=["Qwen2ForCausalLM"])
        with pytest.raises(CheckpointError, match=r"lm_head|must be named model\."):
            qwen2_fp16_fix.export(tmp_path / "checkpoint", tmp_path / "again")


def test_a_quantised_checkpoint_is_exported(checkpoint: Path, tmp_path: Path) -> None:
    """GPTQ models must run in float16, and name their tensors otherwise."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    renamed = {re.sub(r"(up_proj)\.weight", r"\1.qweight", name): tensor for name, tensor in tensors.items()}
    save_file(renamed, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj"):
        qwen2_fp16_fix.export(checkpoint, tmp_path / "out")
    change_config(checkpoint, quantization_config={"quant_method": "gptq"})
    assert config_of(qwen2_fp16_fix.export(checkpoint, tmp_path / "out"))["quantization_config"]


def test_certify_and_verify_take_exports(tmp_path: Path) -> None:
    out = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out", strict=True)
    of_export, of_source = qwen2_fp16_fix.certify(out), qwen2_fp16_fix.certify(CHECKPOINT)
    assert replace(of_export, seconds=0) == replace(of_source, seconds=0)
    assert open_checkpoint(out).config["model_type"] == "qwen2_fp16"
    stock = loading.load(out, fixed=False, dtype=torch.float16, attention="eager")
    assert type(stock).__module__.startswith("transformers.")
    assert qwen2_fp16_fix.status(loading.load(out, fixed=True, dtype=torch.float16, attention="eager")).model.fixed


def snapshot(cache: Path, repo: str = "some/model") -> Path:
    """The demo checkpoint as the Hub's client lays it out: every file is a link to a blob."""
    home = cache / f"models--{repo.replace('/', '--')}"
    commit = "3" * 40
    folder = home / "snapshots" / commit
    for path in (folder, home / "blobs", home / "refs"):
        path.mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(commit)
    for file in CHECKPOINT.iterdir():
        shutil.copy(file, home / "blobs" / f"blob-of-{file.name}")
        (folder / file.name).symlink_to(Path("..", "..", "blobs", f"blob-of-{file.name}"))
    return folder


def test_a_repository_is_exported_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = snapshot(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    by_name = qwen2_fp16_fix.export("some/model", tmp_path / "by_name")
    by_path = qwen2_fp16_fix.export(folder, tmp_path / "by_path")
    assert contents(by_name) == contents(by_path)
    assert not any(path.is_symlink() for path in by_name.iterdir())
    assert (by_name / "model.safetensors").stat().st_ino == (folder / "model.safetensors").stat().st_ino
    assert ModelCard.load(by_name / "README.md").data.base_model == "some/model"
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        qwen2_fp16_fix.export("some/other", tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"give a checkpoint folder, a \.safetensors file, or OWNER/NAME"):
        qwen2_fp16_fix.export("nowhere", tmp_path / "other")


def test_a_link_into_another_repository_of_the_cache_is_refused(tmp_path: Path) -> None:
    folder, other = snapshot(tmp_path), snapshot(tmp_path, "some/other")
    (folder / "vocab.json").symlink_to((other / "tokenizer.json").resolve())
    with pytest.raises(ExportError, match=r"vocab\.json is a link"):
        qwen2_fp16_fix.export(folder, tmp_path / "out")


def test_no_pattern_carries_code() -> None:
    assert not any(Path(name).match(pattern) for pattern in CARRIED for name in CODE_FILES)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(commands.app, ["export", *arguments])


def test_the_help_shows_how_to_name_a_revision() -> None:
    """`[@REVISION]` is markup to rich, which swallowed it."""
    assert "OWNER/NAME@REVISION" in re.sub(r"[\s│]+", "", run("--help").stdout)


def test_the_command_exports(tmp_path: Path) -> None:
    done = run(str(CHECKPOINT), str(tmp_path / "out"), "--strict", "--weights", "copy")
    assert (done.exit_code, done.output.strip()) == (0, str(tmp_path / "out"))
    assert config_of(tmp_path / "out")["model_type"] == "qwen2_fp16"
    done = run(str(CHECKPOINT), str(tmp_path / "code"), "--code-only")
    assert done.exit_code == 0
    assert not list((tmp_path / "code").glob("*.safetensors"))


def test_an_interruption_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_place", interrupt)
    done = run(str(CHECKPOINT), str(tmp_path / "out"))
    assert isinstance(done.exception, ExportError)
    assert "interrupted" in str(done.exception)
    assert not list(tmp_path.iterdir())
