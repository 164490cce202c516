"""What is no whole Qwen2 is not exported, and nothing that is there is overwritten."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qwen2_fp16_fix
from qwen2_fp16_fix.demo import CHECKPOINT
from qwen2_fp16_fix.errors import CheckpointError, ExportError
from qwen2_fp16_fix.files import folders
from qwen2_fp16_fix.patches.errors import NotQwen2Error
from tests.hub.examples import change_config, contents


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
        (link_to_nothing, CheckpointError, "broken link"),
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
    with pytest.raises(CheckpointError, match="out of date"):
        qwen2_fp16_fix.export(sharded, tmp_path / "out")


def test_an_index_cannot_name_files_elsewhere(sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    shutil.copy(sharded / "model-00001-of-00004.safetensors", tmp_path / "secret.safetensors")
    index.write_text(index.read_text().replace("model-00001-of-00004", "../secret"))
    with pytest.raises(CheckpointError, match=r"not a \.safetensors file beside it"):
        qwen2_fp16_fix.export(sharded, tmp_path / "out")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"weights": "none", "code_repo": "some/code"}, "neither code nor weights"),
        ({"code_repo": "code"}, "'code' is not a repository"),
        ({"code_repo": "some/code@"}, "not a repository"),
        ({"code_repo": "some/co--de"}, "not a repository"),
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
        checkpoint: "is inside",
        checkpoint / "sub" / "out": "is inside",
        tmp_path: "is inside",
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

    monkeypatch.setattr(folders, "flush", fill)
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
            with pytest.raises(ExportError, match="cannot be read or written"):
                qwen2_fp16_fix.export(source, place / "locked" / "out")
        finally:
            if root:
                os.seteuid(0)
        assert not list((place / "locked").iterdir())
