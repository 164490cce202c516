"""A folder whose files are no weights, or lie about them, ends in one sentence in every command, and at once."""

import json
import os
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qwen2_fp16_fix
from qwen2_fp16_fix.checkpoints.stored import FLOATS
from qwen2_fp16_fix.diagnosis import checkpoint as doctor
from qwen2_fp16_fix.errors import CheckpointError
from tests.checkpoints.tiny import settings
from tests.stress import Shape
from tests.stress.models import config

SMALL = Shape(hidden=8, layers=2, heads=2, kv_heads=1, intermediate=6, vocab=7)
NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
FILE, SHARD, INDEX = "model.safetensors", "a.safetensors", "model.safetensors.index.json"
SECONDS = 20  # a hang; the slowest input takes less than one
WRITERS: list[int] = []  # of the pipes of a test


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "checkpoint"
    transformers.Qwen2ForCausalLM(config(SMALL)).half().save_pretrained(path)
    return path


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """Ends a test that waits for a pipe, or counts to a million."""

    def give_up(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while WRITERS:
        os.close(WRITERS.pop())


def refusals(folder: Path) -> list[str]:
    """What each command says of the folder."""
    commands: list[Callable[[], Any]] = [
        lambda: qwen2_fp16_fix.certify(folder),
        lambda: qwen2_fp16_fix.scan(folder, [[1, 2]]),
        lambda: qwen2_fp16_fix.verify(folder, "a b"),
        lambda: qwen2_fp16_fix.export(folder, folder.parent / "out"),
    ]
    said = []
    for command in commands:
        with pytest.raises(CheckpointError) as caught:
            command()
        said.append(str(caught.value))
    return [*said, *(problem.values["problem"] for problem in doctor.examine(folder)[2])]


def check_refused(folder: Path, sentence: str) -> None:
    said = refusals(folder)
    assert len(said) == 5
    for words in said:
        assert sentence in words
        assert "\n" not in words


def in_a_shard(folder: Path) -> None:
    names = load_file(folder / FILE)
    (folder / FILE).rename(folder / SHARD)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, SHARD)}))


def replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Something else in the place of a file."""

    def change(folder: Path) -> None:
        if name == SHARD:
            in_a_shard(folder)
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def pipe(path: Path) -> None:
    """With a writer: safetensors waits for one again after every signal."""
    os.mkfifo(path)
    WRITERS.append(os.open(path, os.O_RDWR))


def to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def index(weight_map: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        in_a_shard(folder)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return change


def header(**changed: Any) -> Callable[[Path], None]:
    """Another header of the weights; `norm` changes what it says of one tensor."""

    def change(folder: Path) -> None:
        content = (folder / FILE).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        said = json.loads(content[8 : 8 + length])
        said[NORM] |= changed.get("norm", {})
        said |= {name: value for name, value in changed.items() if name != "norm"}
        text = json.dumps(said).encode()
        (folder / FILE).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return change


def content(data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / FILE).write_bytes(data) and None


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (replaced(FILE, pipe), "has no model.safetensors"),
    "device": (replaced(FILE, to_a_device), "has no model.safetensors"),
    "link to itself": (replaced(FILE, to_itself), "has no model.safetensors"),
    "pipe for a shard": (replaced(SHARD, pipe), "a.safetensors is a pipe"),
    "device for a shard": (replaced(SHARD, to_a_device), "a.safetensors is a device"),
    "folder for a shard": (replaced(SHARD, Path.mkdir), "a.safetensors is a folder"),
    "link to itself for a shard": (replaced(SHARD, to_itself), "a.safetensors cannot be read"),
    "no shard": (replaced(SHARD, lambda path: None), "the shard a.safetensors is missing"),
    "shard elsewhere": (index({NORM: "../a.safetensors"}), "names '../a.safetensors'"),
    "absolute shard": (index({NORM: "/dev/zero"}), "names '/dev/zero'"),
    "shard in a folder": (index({NORM: "b/a.safetensors"}), "names 'b/a.safetensors'"),
    "NUL": (index({NORM: "a\0.safetensors"}), "names 'a\\x00.safetensors'"),
    "pickled shard": (index({NORM: "pytorch_model.bin"}), "names 'pytorch_model.bin'"),
    "list for a map": (index([]), "has no weight_map"),
    "number for a shard": (index({NORM: 1}), "has no weight_map"),
    "nothing in the index": (index({}), "the weights 0 layers"),
    "an index of others": (index({"x\n": SHARD}), "a.safetensors does not hold 'x\\n'"),
    "an index of fewer": (index({NORM: SHARD}), "which its index does not name"),
    "empty": (content(b""), "model.safetensors cannot be read"),
    "no tensors": (content(struct.pack("<Q", 2) + b"{}"), "the weights 0 layers"),
    "a header past the end": (content(struct.pack("<Q", 2**62) + b"{}"), "model.safetensors cannot be read"),
    "offsets past the end": (header(norm={"data_offsets": [0, 2**40]}), "model.safetensors cannot be read"),
    "a size past the end": (header(norm={"shape": [2**40]}), "model.safetensors cannot be read"),
    "a line break": (header(**{"x\ny": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}), "cannot be read"),
    "another framework": (header(__metadata__={"format": "tf"}), "has weights of another framework (tf)"),
    "a million layers": (settings(num_hidden_layers=10**6), "num_hidden_layers = 1000000, but the weights 2 layers"),
    "another config": (settings(configuration_files=["config.4.0.0.json"]), "config.json has configuration_files"),
    "other names": (settings(attribute_map={"rms_norm_eps": "eps"}, eps=1.0), "config.json has attribute_map"),
    "10^30 layers": (settings(num_hidden_layers=10**30), "the weights 2 layers"),
}


@pytest.mark.skipif(os.name == "nt", reason="pipes, devices and links are POSIX's")
@pytest.mark.parametrize("damage", DAMAGED)
def test_it_is_one_sentence_in_every_command(damage: str, folder: Path) -> None:
    change, sentence = DAMAGED[damage]
    change(folder)
    check_refused(folder, sentence)


#: Types of safetensors 0.8 and the bits of a number. torch has none for some, and safetensors no slice of others.
BITS = {"F4": 4, "F6_E2M3": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64, "BOOL": 8, "I8": 8, "U8": 8}


@pytest.mark.parametrize("name", [UP, NORM, "model.embed_tokens.weight"])
@pytest.mark.parametrize("dtype", BITS)
def test_numbers_that_need_scales_are_refused_without_them(dtype: str, name: str, folder: Path) -> None:
    """scan ended in a traceback, export took it, and stock loads the bare numbers."""
    tensors = load_file(folder / FILE)
    said: dict[str, Any] = {}
    data = b""
    for each, tensor in tensors.items():
        part = tensor.numpy().tobytes() if each != name else bytes(tensor.numel() * BITS[dtype] // 8)
        place = [len(data), len(data) + len(part)]
        said[each] = {"dtype": dtype if each == name else "F16", "shape": list(tensor.shape), "data_offsets": place}
        data += part
    text = json.dumps(said).encode()
    (folder / FILE).write_bytes(struct.pack("<Q", len(text)) + text + data)
    check_refused(folder, f"{name} is stored as {dtype}, and config.json has no quantization_config")
    settings(quantization_config={"quant_method": "fp8"})(folder)
    assert not qwen2_fp16_fix.certify(folder).proven


def test_more_layers_than_a_quantised_file_has_are_refused(folder: Path) -> None:
    """Nothing else is checked of it, and a million layers were bounded one after the other."""
    settings(num_hidden_layers=10**6, quantization_config={"quant_method": "gptq"})(folder)
    check_refused(folder, "the weights 2 layers")


def test_a_file_is_read_as_it_is_named(folder: Path) -> None:
    """A pipe's name led to model.safetensors beside it."""
    pipe(folder / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors is a pipe"):
        qwen2_fp16_fix.certify(folder / "other.safetensors")
    assert qwen2_fp16_fix.certify(folder / FILE).proven


def test_all_plain_types_are_taken(folder: Path) -> None:
    for dtype, name in zip((torch.float16, torch.bfloat16, torch.float32, torch.float64), FLOATS, strict=True):
        save_file({key: tensor.to(dtype) for key, tensor in load_file(folder / FILE).items()}, folder / FILE)
        assert doctor.examine(folder)[0]["stored"].keys() == {name}
        assert qwen2_fp16_fix.certify(folder).proven
