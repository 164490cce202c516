"""A checkpoint folder: its configuration, and its tensors by name, checked by the headers and read when asked for."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.reading import read_utf8
from ..patches.architecture import QWEN2
from ..patches.range_bounds import layer_shapes
from ..patches.version_map import NUMERICS
from .config import foreign_code, generates, is_exported, reachable, read_config, read_shape, read_size
from .stored import FLOATS, Stored, opened, prefix_of, stored_tensors
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

LM_HEAD = "lm_head.weight"
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


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
                f"its auto_map names code of its own ({self.foreign_code}): with trust_remote_code=True that code "
                "loads, which was not examined here",
            )
        numerics = numerics_of_export(folder, self.config)
        if numerics not in (None, NUMERICS):
            self.warnings += (older_code(numerics),)
        self.layers = read_size(self.config, "num_hidden_layers")
        self.intermediate = read_size(self.config, "intermediate_size")
        self.shape = read_shape(self.config)
        with reachable(path):
            self.stored = stored_tensors(path, self.config)
        self.prefix = prefix_of(self.stored, self.config)
        held = {found[1] for name in self.stored if (found := LAYER.search(name))}
        if self.layers > len(held):
            raise CheckpointError(
                f"config.json has num_hidden_layers = {self.layers}, but the weights {len(held)} layers."
            )

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({found.file for found in self.stored.values()})

    @property
    def tied(self) -> bool:
        """Whether the config says that the head has the embedding's weight."""
        return bool(self.config.get("tie_word_embeddings", False))

    def check_complete(self, head: str | None = LM_HEAD) -> None:
        """Raises CheckpointError if a tensor of a Qwen2 is missing, or is not what its config asks for.

        head: the weight of the output layer that must be there; an lm_head may be tied. A quantised checkpoint has
        tensors of other names: there nothing more is checked.
        """
        if self.config.get("quantization_config"):
            return
        for name, shape in self._wanted_shapes(head):
            self._check_header(name, shape)
        if self.tied and self.has(LM_HEAD):
            self._check_tied()

    def _check_header(self, name: str, shape: tuple[int, ...] | None) -> None:
        """Raises CheckpointError if the tensor is missing, or of another type or shape. None stands for any shape."""
        found = self._stored(name)
        if found.dtype not in FLOATS:
            raise CheckpointError(
                f"{name} is stored as {found.dtype}, and config.json has no quantization_config that says how to read "
                "it: restore that, or give the original checkpoint."
            )
        compare_shapes(name, found.shape, found.shape if shape is None else shape)

    def _check_tied(self) -> None:
        """Raises CheckpointError if the head is not the embedding: some releases take both, some one for the other."""
        embedding = f"{self.prefix}embed_tokens.weight"
        self._check_header(LM_HEAD, self._stored(embedding).shape)
        if not all(torch.equal(*rows) for rows in zip(self.rows(LM_HEAD), self.rows(embedding), strict=True)):
            raise CheckpointError(
                f"{LM_HEAD} is not {embedding}, to which config.json ties it, and releases of transformers differ in "
                f"which they use: set tie_word_embeddings to false, or remove {LM_HEAD}."
            )

    def _wanted_shapes(self, head: str | None) -> Iterator[tuple[str, tuple[int, ...] | None]]:
        """The tensors that must be there and their shapes, None for a shape that the config does not say."""
        hidden, rows = self.shape.hidden, (read_size(self.config, "vocab_size"), self.shape.hidden)
        layer = layer_shapes(self.shape, self.intermediate)
        yield f"{self.prefix}embed_tokens.weight", rows
        yield f"{self.prefix}{QWEN2.final_norm()}.weight", (hidden,)
        for number in range(self.layers):
            for name in self.layer_names(number):
                yield f"{self.prefix}layers.{number}.{name}", layer[name]
        if head and not (head == LM_HEAD and self.tied):
            yield head, rows if head == LM_HEAD else None  # a classifier's rows are its labels

    def layer_names(self, number: int) -> list[str]:
        """Norms, linears and the biases that a Qwen2 has: a checkpoint without one of them is incomplete."""
        return weight_names() + [f"{linear.name}.bias" for linear in QWEN2.linears if linear.bias]

    def heads(self) -> list[str]:
        """The weights of the output layers."""
        found = [f"{name}.weight" for name in OUTPUT_LAYERS if self.has(f"{name}.weight")]
        if self.tied:
            found.append(f"{self.prefix}embed_tokens.weight")
        elif generates(self.config, unnamed=False) and LM_HEAD not in found:
            found.append(LM_HEAD)  # reading it reports that it is missing
        return found

    def has(self, name: str) -> bool:
        """Whether the checkpoint has such a tensor."""
        return name in self.stored

    def rows(self, name: str) -> Iterator[Tensor]:
        """A tensor, some rows at a time."""
        found = self._readable(name)
        if len(found.shape) != 2:
            raise CheckpointError(f"{name} has shape {list(found.shape)}, not rows and columns.")
        with opened(found.file) as tensors:
            stored = tensors.get_slice(name)
            for start in range(0, found.shape[0], ROWS_READ):
                yield check_values(name, stored[start : start + ROWS_READ])

    def read(self, name: str) -> Tensor:
        """A tensor. Raises CheckpointError if it is missing or damaged, UnboundedWeightError if it is quantised."""
        quantised = self.config.get("quantization_config")
        if quantised and any(linear in name for linear in LINEARS):
            method = quantised.get("quant_method", "") if isinstance(quantised, dict) else ""
            raise UnboundedWeightError(
                f"the checkpoint is quantised ({method or 'unnamed method'}): its kernels are not bounded"
            )
        with opened(self._readable(name).file) as tensors:
            return check_values(name, tensors.get_tensor(name))

    def _readable(self, name: str) -> Stored:
        """A tensor of a type that torch computes with."""
        found = self._stored(name)
        if found.dtype not in FLOATS:  # of some types safetensors gives no slice, of others torch has none
            raise UnboundedWeightError(f"{name} is stored as {found.dtype}: quantised weights are not bounded")
        return found

    def _stored(self, name: str) -> Stored:
        if name not in self.stored:
            raise CheckpointError(
                f"the checkpoint has no tensor {name}: it is incomplete, or its config.json is another's."
            )
        return self.stored[name]


def open_checkpoint(folder: Path) -> FolderSource:
    """The folder, checked: a whole Qwen2 in plain floating-point weights. Raises CheckpointError or NotQwen2Error."""
    with reachable(folder):
        is_file = folder.is_file()
    if is_file:
        raise CheckpointError(f"{folder} is a file: give the folder it is in, which is what transformers loads.")
    source = FolderSource(folder)
    if source.config.get("quantization_config"):
        raise CheckpointError(
            f"{folder} is quantised, so there is no fp32 to compare with: give the original checkpoint."
        )
    if source.prefix == "transformer.":
        raise CheckpointError(f"{folder} is for question answering: give a checkpoint of a Qwen2ForCausalLM.")
    source.check_complete()
    return source


def numerics_of_export(folder: Path, config: Mapping[str, Any]) -> int | None:
    """The version of the arithmetic of the code in an exported folder; None if there is none, or it does not say."""
    file = folder / "version_map.py"
    try:
        text = read_utf8(file, "another checkpoint", CheckpointError) if is_exported(config) else ""
    except CheckpointError:
        return None
    found = re.search(r"^NUMERICS = (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None
