"""The same broken checkpoint ends every command with the same exit code, 2, and with one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qwen2_fp16_fix.diagnosis import doctor as diagnosis
from qwen2_fp16_fix.diagnosis.self_test import SelfTests
from tests.checkpoints.tiny import settings, tiny_checkpoint
from tests.commands.in_process import run_command

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("whole") / "checkpoint")


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def holding(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def half(folder: Path) -> None:
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: len(content) // 2])


def no_norm(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    del tensors[NORM]
    save_file(tensors, folder / FILE)


def missing_shard(folder: Path) -> None:
    names = load_file(folder / FILE)
    (folder / FILE).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")}))


def adapter(folder: Path) -> None:
    for name in (FILE, "config.json"):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text("{}")


def gguf(folder: Path) -> None:
    for name in (FILE, "config.json"):
        (folder / name).unlink()
    (folder / "qwen2.gguf").write_text("")


BROKEN: dict[str, Callable[[Path], Any]] = {
    "nothing there": shutil.rmtree,
    "an empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no config": without("config.json"),
    "a config that is no JSON": holding("config.json", "{"),
    "another model": settings(model_type="llama"),
    "sizes that are none": settings(num_hidden_layers="two"),
    "other sizes": settings(hidden_size=16),
    "more layers": settings(num_hidden_layers=3),
    "no weights": without(FILE),
    "half the weights": half,
    "no final norm": no_norm,
    "a shard that is missing": missing_shard,
    "an index that is no JSON": holding(INDEX, "["),
    "an adapter": adapter,
    "GGUF": gguf,
}


def arguments(command: str, folder: Path) -> list[str]:
    """The command on the folder, with what it needs besides."""
    return [command, str(folder), *([str(folder.parent / "out")] if command == "export" else [])]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_has_one_exit_code(
    kind: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """doctor ended with 1, as if its finding were about this machine, and the rest with 2."""
    monkeypatch.setattr(diagnosis, "examine_with_self_test", lambda *_: (SelfTests(0.0, "", []), [], []))
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoint"))
    BROKEN[kind](folder)
    for command in ("certify", "scan", "verify", "export", "doctor"):
        code, printed, said = run_command(monkeypatch, capsys, *arguments(command, folder))
        assert code == 2, (command, said)
        if command != "doctor" or not printed:
            assert (printed, said.count("\n")) == ("", 1), (command, said)
            assert said.startswith("qwen2-fp16-fix: ")
