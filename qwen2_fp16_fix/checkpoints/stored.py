"""The tensors that transformers loads from a checkpoint folder: their files, their names, and what the headers say.

Every supported release loads the same from what is accepted here; only a model that answers questions has other names
before 4.48. A folder is refused where releases differ, or where two tensors would be loaded as one parameter.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors

from ..errors import CheckpointError, first_line, quoted
from ..files.reading import not_a_file
from ..patches.architecture import QWEN2
from .config import ADAPTER, read_json
from .weights import OUTPUT_LAYERS, weight_names

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F16", "BF16", "F32", "F64")  # as headers name the types of plain weights
#: Files of a distributed checkpoint. From 5.24 transformers loads these before model.safetensors.
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
#: What releases remove from a name. Up to 5.24 their pattern has a dot that stands for any character.
PREFIXES = re.compile(r"^((model|transformer).)*")
ENDS = "|".join(re.escape(name) for name in ("embed_tokens.weight", f"{QWEN2.final_norm()}.weight"))
PARTS = "|".join(re.escape(name.removesuffix("weight")) for name in weight_names())
BODY = re.compile(rf"{ENDS}|layers\.\d+\.({PARTS})(weight|bias)")  # the parameters of a base model
HEADS = re.compile(rf"({'|'.join(OUTPUT_LAYERS)})\.(weight|bias)")


class Stored(NamedTuple):
    """Where a tensor is stored, and what the header of that file says about it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(path: Path, config: Mapping[str, Any]) -> dict[str, Stored]:
    """What is loaded, by the names in the files. path: a folder, or a .safetensors file. Raises CheckpointError."""
    if not path.is_dir():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path.name} is not a .safetensors file: convert the checkpoint to safetensors.")
        return _headers([path])
    _check_beside(path, config)
    single, index = path / SINGLE, path / INDEX
    if not index.is_file():
        if not single.is_file():
            hint = ": load the model from its .bin files and save it, to convert them to safetensors"
            raise CheckpointError(f"{path} has no {SINGLE} and no index of shards{hint if has_pickles(path) else ''}.")
        return _headers([single])
    listed = _weight_map(index)
    names = sorted(set(listed.values()))
    if single.is_file() and names != [SINGLE]:
        raise CheckpointError(
            f"{path} has {SINGLE} and an index of other shards, and programs differ in which they load: remove the one "
            "that is out of date."
        )
    found = _headers([path / name for name in names])
    _check_index(listed, found)
    return found


def prefix_of(names: Iterable[str], config: Mapping[str, Any]) -> str:
    """What stands before a base model's names: "model.", "transformer.", or nothing if it was saved by itself.

    Raises CheckpointError for names that not every release loads alike.
    """
    known = {name: base for name in names if (base := _parameter(name)) is not None}
    heads = config.get("architectures") or [""]
    usual = "transformer." if all(head.endswith("ForQuestionAnswering") for head in heads) else "model."
    # releases before 5 take any name that begins so for a sign that all names have the prefix
    prefix = usual if any(name.startswith(usual[:-1]) for name in names) or not _bare(known) else ""
    for name, base in known.items():
        right = base if HEADS.fullmatch(base) else prefix + base
        if name == right:
            continue
        if right in known:
            raise CheckpointError(f"{name} and {right} would be loaded as one parameter: remove the wrong one.")
        raise CheckpointError(f"{name} must be named {right}: not every release of transformers loads it as that.")
    return prefix


def has_pickles(folder: Path) -> bool:
    """Whether the weights are there as .bin files, whole or in shards. Nothing here reads these."""
    return any(folder.glob("pytorch_model*.bin"))


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, for reading. Raises CheckpointError if it is missing, damaged, or not a file."""
    try:
        if (other := not_a_file(file.stat().st_mode)) is not None:  # opening a pipe would wait for a writer
            raise CheckpointError(f"{file.name} is {other}: put the weights themselves there.")
        with safetensors.safe_open(file, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError:
        raise CheckpointError(f"the shard {file.name} is missing: the download is unfinished.") from None
    except (safetensors.SafetensorError, OSError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{file.name} cannot be read ({reason}): it is damaged or half written.") from None


def _check_beside(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for what makes transformers, or a release of it, load other weights than the usual."""
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(ADAPTER.format(folder))
    if config.get("transformers_weights") is not None:  # 4.51 does not know it
        raise CheckpointError(
            f"config.json has transformers_weights = {quoted(config['transformers_weights'])}, which older releases "
            f"ignore: remove it, and name that file {SINGLE} or {INDEX}."
        )
    other = next((file.name for file in sorted(folder.iterdir()) if DISTRIBUTED.match(file.name)), None)
    if other is not None:
        raise CheckpointError(
            f"{folder} holds a distributed checkpoint ({other}), which newer releases load first: load it there, and "
            "save the model to a new folder."
        )


def _headers(files: Iterable[Path]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for file in files:
        with opened(file) as tensors:
            framework = (tensors.metadata() or {}).get("format")
            if framework in ("tf", "flax"):  # releases before 5 read these otherwise
                raise CheckpointError(
                    f"{file.name} has weights of another framework ({framework}): save them with torch."
                )
            for name in tensors.keys():  # noqa: SIM118, an opened file is not a mapping
                if name in found:
                    other = found[name].file.name
                    raise CheckpointError(f"{quoted(name)} is in {other} and in {file.name}: one file is another's.")
                header = tensors.get_slice(name)
                found[name] = Stored(file, tuple(header.get_shape()), header.get_dtype())
    return found


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to the name of its shard."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(f"{index.name} has no weight_map from tensors to files: it is damaged.")
    for file in listed.values():
        if Path(file).name != file or not file.endswith(".safetensors") or not file.isprintable():
            raise CheckpointError(f"{index.name} names {quoted(file)}, which is not a .safetensors file beside it.")
    return listed


def _check_index(listed: Mapping[str, str], held: Mapping[str, Stored]) -> None:
    """Raises CheckpointError unless each shard holds what the index says: releases differ in which of them they ask."""
    for name, file in listed.items():
        if name not in held or held[name].file.name != file:
            raise CheckpointError(f"{file} does not hold {quoted(name)}, which its index says: it is another's.")
    for name, found in held.items():
        if name not in listed:
            raise CheckpointError(
                f"{found.file.name} holds {quoted(name)}, which its index does not name: it is another's."
            )


def _parameter(name: str) -> str | None:
    """The base model's or the head's parameter that some release loads the tensor as; None if none does."""
    # up to 4.48 releases rename gamma and beta wherever they stand
    base = PREFIXES.sub("", name.replace("gamma", "weight").replace("beta", "bias"))
    return base if BODY.fullmatch(base) or HEADS.fullmatch(base) else None


def _bare(known: Mapping[str, str]) -> bool:
    """Whether the names of a base model stand there without a prefix."""
    return any(name == base and BODY.fullmatch(base) for name, base in known.items())
