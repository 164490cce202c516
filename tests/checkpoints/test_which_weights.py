"""The opener and transformers read the same weights: what the opener takes is loaded by stock, and they are compared.

Folders are made by one or two changes to a plain checkpoint. Each tensor that a change adds has values of its own.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from qwen2_fp16_fix.checkpoints.folder import LM_HEAD, FolderSource, open_checkpoint
from qwen2_fp16_fix.checkpoints.loading import dtype_keyword, quiet
from qwen2_fp16_fix.checkpoints.stored import BODY
from qwen2_fp16_fix.errors import CheckpointError
from tests.stress import Shape
from tests.stress.models import config

SMALL = Shape(hidden=8, layers=2, heads=2, kv_heads=1, intermediate=6, vocab=7)
NORM, V, HEAD = "model.norm.weight", "model.layers.1.self_attn.v_proj.weight", "lm_head.weight"


class Folder:
    """A checkpoint before it is written: files of tensors, the index, the config, and files with nothing inside."""

    def __init__(self) -> None:
        model = transformers.Qwen2ForCausalLM(config(SMALL))
        self.config = model.config.to_dict() | {"architectures": ["Qwen2ForCausalLM"], "dtype": None}
        self.tensors = {name: torch.randn(weight.shape) for name, weight in model.state_dict().items()}
        self.files: dict[str, dict[str, Tensor]] = {}
        self.index: dict[str, str] | None = None
        self.single: str | None = "model.safetensors"  # where `tensors` go
        self.empty: list[str] = []

    def other(self, *names: str) -> dict[str, Tensor]:
        """These tensors, or all of them, with other values. A change before may have renamed them."""
        return {name: torch.randn_like(old) for name, old in self.tensors.items() if not names or name in names}

    def write(self, path: Path) -> Path:
        path.mkdir()
        (path / "config.json").write_text(json.dumps(self.config, default=str))
        files = self.files | ({self.single: self.tensors} if self.single else {})
        for name, tensors in files.items():
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            if name.endswith(".bin"):
                torch.save(contiguous, path / name)
            else:
                save_file(contiguous, path / name, metadata={"format": "pt"})
        if self.index is not None:
            index = {"metadata": {}, "weight_map": self.index}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
        for name in self.empty:
            (path / name).write_text("{}")
        return path


def shards(folder: Folder) -> None:
    names = sorted(folder.tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        folder.files[file] = {name: folder.tensors[name] for name in part}
        folder.index = (folder.index or {}) | dict.fromkeys(part, file)
    folder.single = None


def index_of_one(folder: Folder) -> None:
    folder.index = dict.fromkeys(folder.tensors, "model.safetensors")


def index_beside(folder: Folder) -> None:
    folder.files["old.safetensors"] = folder.other()
    folder.index = dict.fromkeys(folder.tensors, "old.safetensors")


def twice_in_shards(folder: Folder) -> None:
    shards(folder)
    folder.files["model-00002-of-00002.safetensors"] |= folder.other(V)
    folder.files["model-00001-of-00002.safetensors"] |= folder.other(V)


def not_in_the_index(folder: Folder) -> None:
    shards(folder)
    folder.index = {name: file for name, file in (folder.index or {}).items() if name != V}


def named_file(folder: Folder) -> None:
    folder.config["transformers_weights"] = "named.safetensors"
    folder.files["named.safetensors"] = folder.other()


def distributed(folder: Folder) -> None:
    folder.files["shard-00000-model-00001-of-00001.safetensors"] = folder.other()


def files_of_other_sorts(folder: Folder) -> None:
    folder.files |= {"model.fp16.safetensors": folder.other(), "pytorch_model.bin": folder.other()}


def adapter(folder: Folder) -> None:
    folder.empty.append("adapter_config.json")


def rename(old: str, new: str) -> Callable[[Folder], None]:
    """Tensors whose names begin so get another beginning."""

    def change(folder: Folder) -> None:
        folder.tensors = {
            new + name.removeprefix(old) if name.startswith(old) else name: tensor
            for name, tensor in folder.tensors.items()
        }

    return change


def beside(old: str, new: str) -> Callable[[Folder], None]:
    """A tensor that may be loaded in place of another."""

    def change(folder: Folder) -> None:
        folder.tensors |= {name.replace(old, new): tensor for name, tensor in folder.other(old).items()}

    return change


def drop(name: str) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        folder.tensors.pop(name, None)

    return change


def settings(**changed: Any) -> Callable[[Folder], None]:
    return lambda folder: folder.config.update(changed)


def other_types_and_names(folder: Folder) -> None:
    """Float64 for some, and tensors that no Qwen2 has."""
    folder.tensors |= {name: tensor.double() for name, tensor in folder.tensors.items() if "norm" in name}
    folder.tensors |= {"rotary_emb.inv_freq": torch.randn(4), "v_head.weight": torch.randn(2, 2)}


#: Changes of tensors and of the config come first, those of files after them.
CHANGES: dict[str, Callable[[Folder], None]] = {
    "other types and names": other_types_and_names,
    "base model's names": rename("model.", ""),
    "tied": settings(tie_word_embeddings=True),
    "no head": drop(HEAD),
    "fewer layers": settings(num_hidden_layers=1),
    "more layers": settings(num_hidden_layers=3),
    "for answers": settings(architectures=["Qwen2ForQuestionAnswering"]),
    "names for answers": rename("model.", "transformer."),
    "two prefixes": rename("model.", "model.model."),
    "no norm": drop(NORM),
    "norm without prefix": rename(NORM, "norm.weight"),
    "v without prefix": beside(V, V.removeprefix("model.")),
    "v with two prefixes": beside(V, f"model.{V}"),
    "v with another prefix": beside(V, V.replace("model", "transformer")),
    "gamma": rename(NORM, "model.norm.gamma"),
    "gamma beside": beside(NORM, "model.norm.gamma"),
    "head with prefix": beside(HEAD, f"model.{HEAD}"),
    "a name that begins like the prefix": beside(NORM, "model_average.norm.weight"),
    "any character for the dot": beside(NORM, "model/norm.weight"),
    "adapter": adapter,
    "distributed": distributed,
    "named file": named_file,
    "files of other sorts": files_of_other_sorts,
    "index beside": index_beside,
    "index of one": index_of_one,
    "shards": shards,
    "twice in shards": twice_in_shards,
    "not in the index": not_in_the_index,
}
#: Changes that the opener takes, by themselves.
TAKEN = ["other types and names", "base model's names", "no head", "fewer layers", "files of other sorts"]
TAKEN += ["a name that begins like the prefix", "index of one", "shards"]


def loaded(path: Path, name: str) -> dict[str, Tensor]:
    """The weights of the stock model that transformers loads, by their names below it; nothing if it raises."""
    options: Any = {dtype_keyword(transformers.__version__): torch.float32}
    try:
        with quiet():
            model: Any = getattr(transformers, name).from_pretrained(path, **options)
    except Exception:  # whatever it trips over: then it loads nothing else
        return {}
    return {name.removeprefix(f"{model.base_model_prefix}."): weight for name, weight in model.named_parameters()}


def differing(path: Path, base: bool) -> list[str] | None:
    """The parameters that transformers loads otherwise than the opener reads them; None if the opener refuses.

    They are loaded as the class that the config names. A scan loads a ForCausalLM, and it alone reads the lm_head.
    base: whether to load the model without a head as well.
    """
    try:
        source = FolderSource(path)
        source.check_complete(head=None)
    except CheckpointError:
        return None
    scanned = False
    with suppress(CheckpointError):
        scanned = bool(open_checkpoint(path))
    classes = set(source.config["architectures"] or ())
    classes |= {"Qwen2ForCausalLM"} if scanned else set()
    classes |= {"Qwen2Model"} if base and source.prefix != "transformer." else set()
    found = []
    for class_name in classes:
        for name, weight in loaded(path, class_name).items():
            is_body = BODY.fullmatch(name)
            if is_body or (name == LM_HEAD and scanned):
                stored = source.read(f"{source.prefix}{name}" if is_body else name)
                found += [] if torch.equal(stored.float(), weight) else [f"{class_name} {name}"]
    return found


@pytest.mark.parametrize("first", CHANGES)
def test_what_is_read_is_what_transformers_loads(first: str, tmp_path: Path) -> None:
    taken = set()
    for change in (first, *(second for one, second in combinations(CHANGES, 2) if one == first)):
        folder = Folder()
        for name in dict.fromkeys((first, change)):
            CHANGES[name](folder)
        path = folder.write(tmp_path / "x")
        found = differing(path, base=change == first)
        assert not found, (first, change, found)
        if found is not None:
            taken.add(change)
        shutil.rmtree(path)
    assert (first in taken) == (first in TAKEN)
