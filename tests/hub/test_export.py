"""Exporting a checkpoint: what the folder holds, what is refused, and what an interruption leaves."""

import errno
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import qwen2_fp16_fix
from qwen2_fp16_fix import demo, files
from qwen2_fp16_fix.checkpoints.folder import open_checkpoint
from qwen2_fp16_fix.cli import commands as cli
from qwen2_fp16_fix.cli import main
from qwen2_fp16_fix.demo import CHECKPOINT
from qwen2_fp16_fix.errors import CheckpointError, ExportError
from qwen2_fp16_fix.hub import export as exported_folder
from qwen2_fp16_fix.hub import model_card
from qwen2_fp16_fix.hub.export import CARRIED, CODE_FILES, PATCHES
from qwen2_fp16_fix.patches.errors import NotQwen2Error, PatchConflictError

SHARDS = 4


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def change_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | changes))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The demo checkpoint, to be spoilt."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


@pytest.fixture
def sharded(checkpoint: Path) -> Path:
    """The same in shards with an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    where = {}
    for number in range(SHARDS):
        name = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::SHARDS]}
        save_file(part, checkpoint / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return checkpoint


def test_no_public_name_is_a_module() -> None:
    """A module of a function's name takes its place in the package once it is imported."""
    modules = {path.stem for path in Path(qwen2_fp16_fix.__file__).parent.glob("*.py")}
    assert not modules & set(qwen2_fp16_fix.__all__)


def test_the_entry_file_imports_every_sibling() -> None:
    """As remote code from a local folder, transformers before 5.10 copies what the entry file imports, and no more."""
    entry = (PATCHES / "modeling_qwen2_fp16.py").read_text()
    imported = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", entry, re.M))  # as transformers looks for them
    assert imported == {name.removesuffix(".py") for name in CODE_FILES} - {"__init__", "modeling_qwen2_fp16"}


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
    assert qwen2_fp16_fix.check(out / "qwen2_fp16_fix.lock.json", out) == []
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
    from tests.stress.models import TINY, config

    model = getattr(transformers, f"Qwen2{head}")(config(TINY))
    model.save_pretrained(tmp_path / "checkpoint")
    out = qwen2_fp16_fix.export(tmp_path / "checkpoint", tmp_path / "out")
    assert config_of(out)["architectures"] == [f"Qwen2FP16{head}"]
    if weight:
        change_config(tmp_path / "checkpoint", architectures=["Qwen2ForCausalLM"])
        with pytest.raises(CheckpointError, match="lm_head"):
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
    assert of_export | {"seconds": 0} == of_source | {"seconds": 0}
    assert open_checkpoint(out).config["model_type"] == "qwen2_fp16"
    stock = demo.load(out, fixed=False, dtype=torch.float16, attention="eager")
    assert type(stock).__module__.startswith("transformers.")
    assert qwen2_fp16_fix.status(demo.load(out, fixed=True, dtype=torch.float16, attention="eager"))["model"]["fixed"]


# What is refused


def no_qwen2(folder: Path) -> None:
    change_config(folder, model_type="llama")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def half_written(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: 2**20])


def other_code(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_other.Model"})


def tokenizer_code(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}})
    )


def other_architecture(folder: Path) -> None:
    change_config(folder, architectures=["Qwen2ForRewardModel"])


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def link_out(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere.json"
    (folder / "tokenizer.json").rename(elsewhere)
    (folder / "tokenizer.json").symlink_to(elsewhere)


def weights_link_out(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(elsewhere)
    (folder / "model.safetensors").symlink_to(elsewhere)


def link_to_nothing(folder: Path) -> None:
    (folder / "vocab.json").symlink_to(folder / "nothing")


def broken_card(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [\n---\n")


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (no_qwen2, NotQwen2Error, "'llama', not 'qwen2'"),
        (no_config, CheckpointError, "has no config.json"),
        (no_weights, CheckpointError, "has no model.safetensors"),
        (half_written, CheckpointError, "damaged or half written"),
        (other_code, ExportError, "AutoModelForCausalLM from other code"),
        (tokenizer_code, ExportError, "AutoTokenizer from other code"),
        (other_architecture, ExportError, "'Qwen2ForRewardModel'"),
        (adapter, CheckpointError, "PEFT adapter"),
        (link_out, ExportError, "tokenizer.json is a link to .*outside"),
        (weights_link_out, ExportError, "model.safetensors is a link to .*outside"),
        (link_to_nothing, CheckpointError, "link to nothing"),
        (broken_card, ExportError, "front matter"),
    ],
)
def test_a_checkpoint_that_is_no_whole_qwen2_is_refused(
    spoil: Callable[[Path], None], error: type[Exception], says: str, checkpoint: Path, tmp_path: Path
) -> None:
    spoil(checkpoint)
    before = contents(checkpoint)
    with pytest.raises(error, match=says) as raised:
        qwen2_fp16_fix.export(checkpoint, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert contents(checkpoint) == before
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    (sharded / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00004"):
        qwen2_fp16_fix.export(sharded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_beside_a_single_file_are_refused(sharded: Path, tmp_path: Path) -> None:
    """transformers would load the one, the index says the others."""
    shutil.copy(CHECKPOINT / "model.safetensors", sharded)
    with pytest.raises(ExportError, match="out of date"):
        qwen2_fp16_fix.export(sharded, tmp_path / "out")


def test_an_index_cannot_name_files_elsewhere(sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    shutil.copy(sharded / "model-00001-of-00004.safetensors", tmp_path / "secret.safetensors")
    index.write_text(index.read_text().replace("model-00001-of-00004", "../secret"))
    with pytest.raises(ExportError, match="not beside it"):
        qwen2_fp16_fix.export(sharded, tmp_path / "out")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"weights": "none", "code_repo": "some/code"}, "neither code nor weights"),
        ({"code_repo": "code"}, "'code' is no repository"),
        ({"code_repo": "some/code@"}, "no repository"),
        ({"code_repo": "some/co--de"}, "no repository"),
        ({"weights": "move"}, "link, copy or none"),
    ],
)
def test_options_that_make_no_sense_are_refused(asked: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=says):
        qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out", **asked)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_never_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "precious").write_text("x")
    file.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path)
    places = {
        full: "not empty",
        file: "not a folder",
        link: "not a folder",
        checkpoint: "lies inside",
        checkpoint / "sub" / "out": "lies inside",
        tmp_path: "lies inside",
        file / "out": "something else is there|not written",
    }
    for place, says in places.items():
        with pytest.raises(ExportError, match=says):
            qwen2_fp16_fix.export(checkpoint, place)
    assert contents(tmp_path) == before


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out") / "config.json").is_file()


def test_a_folder_that_fills_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two exports to one place: the second must not mix with the first."""

    def fill(folder: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()

    monkeypatch.setattr(files, "flush", fill)
    with pytest.raises(ExportError, match="something else is there"):
        qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out")
    assert contents(tmp_path) == {"out/theirs": b""}


@pytest.mark.skipif(os.name == "nt", reason="rights are POSIX's")
def test_a_read_only_place_is_one_sentence() -> None:
    """Root may write anywhere, so root becomes nobody for this, in a folder that nobody can reach."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        source = Path(shutil.copytree(CHECKPOINT, place / "source"))
        (place / "locked").mkdir(mode=0o555)
        place.chmod(0o755)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(ExportError, match="may not be read or written"):
                qwen2_fp16_fix.export(source, place / "locked" / "out")
        finally:
            if root:
                os.seteuid(0)
        assert not list((place / "locked").iterdir())


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_an_interruption_leave_nothing(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, calls = shutil.copyfile, []

    def some(source: Path, target: Path) -> None:
        calls.append(target)
        copy(source, target)
        if len(calls) == 7:
            target.write_bytes(target.read_bytes()[:100])
            raise failure

    monkeypatch.setattr(exported_folder.shutil, "copyfile", some)
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else ExportError) as raised:
        qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out", weights="copy")
    assert len(calls) == 7
    assert isinstance(raised.value, KeyboardInterrupt) or "the disk is full" in str(raised.value)
    assert not list(tmp_path.iterdir())


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import qwen2_fp16_fix
source, folder, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
chance, found = random.Random(seed), []

def export(name, last_event=None):
    pid = os.fork()
    if pid == 0:
        if last_event is not None:
            left = [last_event]
            def count(event, arguments):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(count)
        qwen2_fp16_fix.export(source, folder / name, weights="copy")
        os._exit(0)
    return pid

qwen2_fp16_fix.export(source, folder / "first", weights="copy")  # imports what it needs
events = []
sys.addaudithook(lambda event, arguments: events.append(event))
started = time.monotonic()
qwen2_fp16_fix.export(source, folder / "whole", weights="copy")
seconds, events = time.monotonic() - started, list(events)
rename = events.index("os.rename") + 1
points = [("event", n) for n in (rename, rename + 1, *(chance.randrange(1, len(events)) for _ in range(10)))]
points += [("seconds", seconds * (n + chance.random()) / 10) for n in range(10)]
for number, (kind, when) in enumerate(points):
    pid = export(f"out{number}", when if kind == "event" else None)
    if kind == "seconds":
        time.sleep(when)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    found.append((kind, when, os.waitstatus_to_exitcode(status), (folder / f"out{number}").exists()))
print(json.dumps(found))
"""


@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_kill_leaves_nothing_or_a_whole_folder(
    tmp_path: Path, python: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Ten times at a random moment, ten times at a random system call, and on either side of the rename."""
    seed = int.from_bytes(os.urandom(2), "big")
    done = python("-c", KILLED, str(CHECKPOINT), str(tmp_path), str(seed), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    whole = contents(tmp_path / "whole")
    assert {code for kind, _, code, _ in found if kind == "event"} == {-9}, f"seed {seed}: {found}"
    assert {kind for kind, *_, there in found if not there} == {"event", "seconds"}, f"seed {seed}: {found}"
    assert not found[0][3], "the rename was next"
    for number, (*_, there) in enumerate(found):
        if there:
            assert contents(tmp_path / f"out{number}") == whole, f"seed {seed}: {found[number]}"
        else:
            qwen2_fp16_fix.export(CHECKPOINT, tmp_path / f"out{number}", weights="copy")
    assert not [path for path in tmp_path.iterdir() if "exporting" in path.name]
    assert "an interrupted export had left" in caplog.text


def test_only_what_is_dead_is_cleaned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The temporary folder of an export that still runs, here or on another machine, must not be taken from it."""
    prefix = f".out.exporting-{files.HOST}-"
    done = 2**22 + 1  # past the largest number of a process
    dead, alive, other = f"{prefix}{done}-abc", f"{prefix}{os.getppid()}-abc", ".out.exporting-elsewhere-1-abc"
    for name in (dead, alive, other):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    with caplog.at_level(logging.WARNING):
        qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {alive, other, "out"}
    assert all(name in caplog.text for name in (dead, alive, other))


# The Hub's cache


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
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        qwen2_fp16_fix.export("some/other", tmp_path / "other")
    with pytest.raises(CheckpointError, match="give a checkpoint folder, or OWNER/NAME"):
        qwen2_fp16_fix.export("nowhere", tmp_path / "other")


def test_a_link_into_another_repository_of_the_cache_is_refused(tmp_path: Path) -> None:
    folder, other = snapshot(tmp_path), snapshot(tmp_path, "some/other")
    (folder / "vocab.json").symlink_to((other / "tokenizer.json").resolve())
    with pytest.raises(ExportError, match=r"vocab\.json is a link"):
        qwen2_fp16_fix.export(folder, tmp_path / "out")


# The model card


def findings() -> dict[str, Any]:
    """As `verify` returns them; tests/test_verify.py holds its real answer against the card."""
    row = {"dtype": "float16", "fixed": True, "finite": True, "perplexity": 18.8372, "kl_mean": 1.2e-6, "kl_max": 9e-5}
    broken = {"finite": False, "perplexity": None, "kl_mean": None, "kl_max": None, "top1_agreement": None}
    return {
        "versions": {"transformers": "5.0.0", "torch": "2.13.0"},
        "checkpoint": "demo",
        "settings": {"tokens": 4096, "window": 1024, "device": "cpu"},
        "rows": [row | {"name": "fixed float16 eager", "top1_agreement": 0.9987}, row | broken | {"name": "stock"}],
        "verdict": "Verified: all of it.",
    }


def test_the_card_says_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "verify.json"
    file.write_text(json.dumps(findings()))
    for number, given in enumerate((findings(), file, str(file))):
        out = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / str(number), weights="none", verification=given)
        card = (out / "README.md").read_text()
        assert "| fixed float16 eager | 18.8372 | 1.2e-06 | 9.0e-05 | 0.9987 |" in card
        assert "| stock | NaN | NaN | NaN | NaN |" in card
        assert "Verified: all of it." in card
    assert "Not measured" in (qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "plain") / "README.md").read_text()


def test_the_card_vouches_for_no_device() -> None:
    """It named cards that no test has run on; what `verify` measured says where by itself."""
    assert not re.search(r"V100|T4|GPU|CUDA|\bcards?\b", model_card.CARD)


@pytest.mark.parametrize("place", ["/home/jane-doe/qwen2", "C:\\Users\\jane-doe\\qwen2", "../jane-doe/qwen2/"])
def test_the_card_does_not_say_where_it_was_measured(place: str, tmp_path: Path) -> None:
    """`push` publishes the card, and `verify` prints the path that it was given."""
    measured = findings() | {"checkpoint": place}
    out = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out", weights="none", verification=measured)
    card = (out / "README.md").read_text()
    assert "jane-doe" not in card
    assert "verify` on `qwen2`, against" in card


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps(findings() | {"rows": []}), '{"rows": [{"name": 1}]}'])
def test_another_file_is_no_verification(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ExportError, match="verify --json"):
        qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out", verification=tmp_path / "file")
    with pytest.raises(ExportError, match="cannot be read"):
        qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out", verification=tmp_path / "nothing")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlicense: other\nlicense_name: mine\nlanguage: [en, zh]\n---\n"}, ("other", "mine")),
        ({"LICENSE": "\n      Apache License\n   Version 2.0"}, ("apache-2.0", None)),
        ({"LICENSE": "Qwen RESEARCH LICENSE AGREEMENT"}, ("other", "qwen-research")),
        ({"LICENSE": "Tongyi Qianwen LICENSE AGREEMENT"}, ("other", "tongyi-qianwen")),
        ({"LICENSE": "All rights reserved."}, ("other", None)),
        ({"README.md": "---\ntags: [a]\n---\n", "LICENSE": "Qwen LICENSE AGREEMENT"}, ("other", "qwen")),
        ({}, (None, None)),
    ],
)
def test_the_card_carries_the_licence(
    files: dict[str, str], licence: tuple[str | None, str | None], checkpoint: Path, tmp_path: Path
) -> None:
    for name, text in files.items():
        (checkpoint / name).write_text(text)
    out = qwen2_fp16_fix.export(checkpoint, tmp_path / "out", weights="none")
    data = ModelCard.load(out / "README.md").data
    assert (data.license, data.get("license_name")) == licence
    if "language" in files.get("README.md", ""):
        assert data.language == ["en", "zh"]
    text = (out / "README.md").read_text()
    assert (licence[1] or licence[0] or "do not\nstate") in text


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("code_repo", [None, "some/code"])
def test_the_code_in_the_card_is_python(strict: bool, code_repo: str | None, tmp_path: Path) -> None:
    out = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "out", strict=strict, code_repo=code_repo)
    text = (out / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    compile(block, "card", "exec")
    assert "trust_remote_code=True" in block
    assert ("code_revision=" in block) == (code_repo is not None)
    assert ("refuse to load" in text) == strict
    assert ("silently builds its own Qwen2" in text) == (not strict)
    assert ModelCard.load(out / "README.md").data.pipeline_tag == "text-generation"
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) < 140
    assert model_card.TASKS.keys() == {end for end, _ in exported_folder_heads()}


def exported_folder_heads() -> Any:
    from qwen2_fp16_fix.hub.export_config import AUTO_CLASSES

    return AUTO_CLASSES.values()


# Beside the installed package


@pytest.fixture
def remote(tmp_path: Path) -> Any:
    """A strict export loaded as remote code, with its attention and its weights as ever."""
    out = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "remote", strict=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        out, trust_remote_code=True, dtype=torch.float16, attn_implementation="eager"
    ).eval()


def test_certify_knows_the_linears_of_remote_code(remote: Any) -> None:
    assert qwen2_fp16_fix.certify(remote)["proven"]


def test_errors_of_remote_code_are_the_packages(remote: Any) -> None:
    """Its error classes are its own, and `except PatchConflictError` would miss them."""
    remote.model.norm = torch.nn.Identity()
    for act in (qwen2_fp16_fix.fix, qwen2_fp16_fix.unfix):
        with pytest.raises(PatchConflictError, match="norm is a torch"):
            act(remote)
    found = qwen2_fp16_fix.status(remote)["model"]
    assert not found["fixed"]
    assert "another tool" in found["problem"]


def test_the_switch_is_remote_codes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_FP16_FIX", "0")
    out = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / "off")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    found = qwen2_fp16_fix.status(model)["model"]
    assert (found["fixed"], found["code"]) == (False, None)


RUN = """
import sys, torch, transformers
import qwen2_fp16_fix
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float16, attn_implementation="eager"
    )
    found = qwen2_fp16_fix.status(model)["model"]
    exponents = {layer["mlp"] for layer in found["ranges"]}
    finite = bool(torch.isfinite(model(torch.arange(20)[None]).logits).all())
    print(found["fixed"], found["code"], "by token" in exponents, finite)
"""


def test_run_and_remote_code_go_together(tmp_path: Path, python: Callable[..., Any]) -> None:
    """`run` gives the fixed classes stock's names, and remote code that builds on those found them patched."""
    folders = [qwen2_fp16_fix.export(CHECKPOINT, tmp_path / str(s), strict=s) for s in (False, True)]
    (tmp_path / "script.py").write_text(RUN)
    arguments = ["-m", "qwen2_fp16_fix", "run", "--", "python", str(tmp_path / "script.py"), *map(str, folders)]
    done = python(*arguments)
    assert done.returncode == 0, done.stderr
    plain, strict = done.stdout.splitlines()[-2:]
    assert plain in ("True package False True", "True remote False True")  # by release
    assert strict == "True remote False True"


# The command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["export", *arguments])


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


def test_an_error_is_one_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qwen2-fp16-fix", "export", str(tmp_path / "nothing"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert not list(tmp_path.iterdir())


def test_an_interruption_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exported_folder, "_place", interrupt)
    done = run(str(CHECKPOINT), str(tmp_path / "out"))
    assert isinstance(done.exception, ExportError)
    assert "interrupted" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_no_pattern_carries_code() -> None:
    assert not any(Path(name).match(pattern) for pattern in CARRIED for name in CODE_FILES)
