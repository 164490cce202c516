"""A checkpoint folder: its configuration, and the tensors of its safetensors shards by name, read when asked for."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from ..errors import CheckpointError
from ..patches.architecture import QWEN2
from ..patches.range_bounds import layer_shapes
from ..patches.version_map import NUMERICS
from .config import foreign_code, generates, is_exported, reachable, read_config, read_json, read_shape, read_size
from .weights import (
    LINEARS,
    OUTPUT_LAYERS,
    ROWS_READ,
    UnboundedWeightError,
    check_values,
    compare_shapes,
    older_code,
    weight_names,
)

PREFIXES = ("model.", "", "transformer.")
LM_HEAD = "lm_head.weight"
Shapes = dict[str, tuple[int, ...]]  # by the names of tensors


class FolderSource:
    """The tensors of a checkpoint, by their names in its shards."""

    def __init__(self, path: Path) -> None:
        """path: a folder, or a file with its config.json beside it. Raises CheckpointError or NotQwen2Error."""
        with reachable(path):
            folder = path if path.is_dir() else path.parent
            if not path.exists():
                raise CheckpointError(f"there is no {path}: give a checkpoint folder or a .safetensors file.")
        self.config = read_config(folder)
        self.foreign_code = foreign_code(self.config)
        self.warnings: tuple[str, ...] = ()
        if self.foreign_code is not None:
            self.warnings = (
                f"its auto_map names code of its own ({self.foreign_code}): with trust_remote_code=True that is what "
                "loads, not what was looked at here",
            )
        numerics = numerics_of_export(folder, self.config)
        if numerics not in (None, NUMERICS):
            self.warnings += (older_code(numerics),)
        self.layers = read_size(self.config, "num_hidden_layers")
        self.intermediate = read_size(self.config, "intermediate_size")
        self.shape = read_shape(self.config)
        self.files = shards(path, folder)
        self.prefix = next((p for p in PREFIXES if f"{p}{QWEN2.final_norm()}.weight" in self.files), "model.")

    @property
    def tied(self) -> bool:
        """Whether the config says that the head has the embedding's weight."""
        return bool(self.config.get("tie_word_embeddings", False))

    def check_complete(self, head: str | None = LM_HEAD) -> None:
        """Raises CheckpointError if a tensor of a Qwen2 is missing, or has another shape than its config asks for.

        head: the weight of the output layer that must be there; an lm_head may be tied. A quantised checkpoint has
        tensors of other names: there only the index is checked, whose tensors the shards must hold.
        """
        wanted = {} if self.config.get("quantization_config") else self._wanted_shapes(head)
        held: dict[Path, Shapes] = {}
        for name in (*wanted, *self.files):
            file = self._file(name)
            if file not in held:
                held[file] = stored_shapes(file)
            if name not in held[file]:
                raise CheckpointError(f"{file.name} does not hold {name}, which its index says: it is another's.")
            compare_shapes(name, held[file][name], wanted.get(name) or held[file][name])

    def _wanted_shapes(self, head: str | None) -> dict[str, tuple[int, ...] | None]:
        """The tensors that must be there and their shapes, None for a shape that the config does not say."""
        hidden, rows = self.shape.hidden, (read_size(self.config, "vocab_size"), self.shape.hidden)
        layer = layer_shapes(self.shape, self.intermediate)
        ends = {"embed_tokens.weight": rows, f"{QWEN2.final_norm()}.weight": (hidden,)}
        found: dict[str, tuple[int, ...] | None] = {f"{self.prefix}{name}": size for name, size in ends.items()}
        for number in range(self.layers):
            found |= {f"{self.prefix}layers.{number}.{name}": layer[name] for name in self.layer_names(number)}
        if head and not (head == LM_HEAD and self.tied):
            found[head] = rows if head == LM_HEAD else None  # a classifier's rows are its labels
        return found

    def layer_names(self, number: int) -> list[str]:
        """Norms, linears and the biases that a Qwen2 has: a checkpoint without one of them is incomplete."""
        return weight_names() + [f"{linear.name}.bias" for linear in QWEN2.linears if linear.bias]

    def heads(self) -> list[str]:
        """The weights of the output layers. With tied embeddings and a head, releases differ in which one they use."""
        found = [f"{name}.weight" for name in OUTPUT_LAYERS if self.has(f"{name}.weight")]
        if self.tied:
            found.append(f"{self.prefix}embed_tokens.weight")
        elif generates(self.config, unnamed=False) and LM_HEAD not in found:
            found.append(LM_HEAD)  # reading it reports that it is missing
        return found

    def has(self, name: str) -> bool:
        """Whether the checkpoint has such a tensor."""
        return name in self.files

    def rows(self, name: str) -> Iterator[Tensor]:
        """A tensor, some rows at a time."""
        with opened(self._file(name)) as tensors:
            stored = tensors.get_slice(name)
            if len(stored.get_shape()) != 2:
                raise CheckpointError(f"{name} has shape {stored.get_shape()}, not rows and columns.")
            for start in range(0, stored.get_shape()[0], ROWS_READ):
                yield check_values(name, stored[start : start + ROWS_READ])

    def read(self, name: str) -> Tensor:
        """A tensor. Raises CheckpointError if it is missing or damaged, UnboundedWeightError if it is quantised."""
        quantised = self.config.get("quantization_config")
        if quantised and any(linear in name for linear in LINEARS):
            method = quantised.get("quant_method", "") if isinstance(quantised, dict) else ""
            raise UnboundedWeightError(
                f"the checkpoint is quantised ({method or 'unnamed method'}): its kernels are not bounded"
            )
        with opened(self._file(name)) as tensors:
            return check_values(name, tensors.get_tensor(name))

    def _file(self, name: str) -> Path:
        if name not in self.files:
            raise CheckpointError(
                f"the checkpoint has no tensor {name}: it is incomplete, or its config.json another's."
            )
        return self.files[name]


def open_checkpoint(folder: Path) -> FolderSource:
    """The folder, checked: a whole Qwen2 in plain floating-point weights. Raises CheckpointError or NotQwen2Error."""
    with reachable(folder):
        is_file = folder.is_file()
    if is_file:
        raise CheckpointError(f"{folder} is a file: give the folder it lies in, which is what transformers loads.")
    source = FolderSource(folder)
    if source.config.get("quantization_config"):
        raise CheckpointError(f"{folder} is quantised: there is no fp32 to compare with, give the original checkpoint.")
    check_no_adapter(folder)
    source.check_complete()
    return source


def check_no_adapter(folder: Path) -> None:
    """Raises CheckpointError if the folder holds a PEFT adapter."""
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} holds a PEFT adapter: merge it (merge_and_unload) and save the merged model.")


def shards(path: Path, folder: Path) -> dict[str, Path]:
    """Tensor name to the shard that holds it. path: the folder, or one file in it. Raises CheckpointError."""
    index = folder / "model.safetensors.index.json"
    if path.is_dir() and index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise CheckpointError(f"{index.name} has no weight_map from tensors to files: it is damaged.")
        return {name: folder / file for name, file in listed.items()}
    file = path if path.is_file() else folder / "model.safetensors"
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file.name} is no .safetensors file: convert the checkpoint to safetensors.")
    if not file.is_file():
        hint = " (it has .bin files: convert them to safetensors)" if list(folder.glob("*.bin")) else ""
        raise CheckpointError(f"{folder} has no model.safetensors and no index of shards{hint}.")
    return dict.fromkeys(stored_shapes(file), file)


def stored_shapes(file: Path) -> Shapes:
    """The shapes of the tensors in a shard, from its header. Raises CheckpointError."""
    with opened(file) as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, for reading. Raises CheckpointError if it is missing or damaged."""
    try:
        with safetensors.safe_open(file, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError:
        raise CheckpointError(f"the shard {file.name} is missing: the download is unfinished.") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name} cannot be read ({error}): it is damaged or half written.") from None


def numerics_of_export(folder: Path, config: Mapping[str, Any]) -> int | None:
    """The version of the arithmetic of the code in an exported folder; None if there is none, or it does not say."""
    try:
        text = (folder / "version_map.py").read_text(encoding="utf-8") if is_exported(config) else ""
    except (OSError, ValueError):
        return None
    found = re.search(r"^NUMERICS = (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None
