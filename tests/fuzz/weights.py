"""Weight files: damaged headers, shards, indexes and folders, all dtypes, and values that no arithmetic likes."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.fuzz import bases, proofs
from tests.fuzz.configs import beside
from tests.fuzz.damage import Raw, change_file, change_text, change_tree, dumps, odd_key, odd_value
from tests.fuzz.worker import Trial

COUNT = 1000
DTYPES = ("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F16", "BF16", "F32", "F64", "C64", "F4")
DTYPES += ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "I4", "f16", "", "X")
BITS = {"F4": 4, "I4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
TORCH_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool)
TORCH_DTYPES += (torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.int16)
VALUES = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 2.0**-24, 2.0**-30, 65504.0, -65504.0, 1e5, 1e38)
VALUES += (3e4, 1e3, 300.0, 2.0**-14, 2.0**-140)
Damage = Callable[[Path, random.Random], None]


# The header


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(file: Path, header: str, data: bytes, length: int | None = None) -> None:
    """Writes a safetensors file; `length` in place of the header's own."""
    text = header.encode("utf-8", "surrogatepass")
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def shard(folder: Path, chosen: random.Random) -> Path:
    """One of the files with weights."""
    return chosen.choice(sorted(folder.glob("*.safetensors")))


def tensor_of(header: dict[str, Any], chosen: random.Random) -> dict[str, Any]:
    """The entry of a tensor."""
    entry: dict[str, Any] = header[chosen.choice(sorted(name for name in header if name != "__metadata__"))]
    return entry


def other_tree(folder: Path, chosen: random.Random) -> None:
    """Anything in the header."""
    file = shard(folder, chosen)
    header, data = split(file)
    join(file, dumps(change_tree(header, chosen)), data)


def other_header_text(folder: Path, chosen: random.Random) -> None:
    """The header's text, damaged."""
    file = shard(folder, chosen)
    header, data = split(file)
    text = change_text(json.dumps(header).encode(), chosen)[:50_000_000]
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def other_length(folder: Path, chosen: random.Random) -> None:
    """A length of the header that it has not."""
    file = shard(folder, chosen)
    header, data = split(file)
    length = chosen.choice((0, 1, 7, 100_000_000, 2**31, 2**63, 2**64 - 1, len(json.dumps(header)) + 1))
    join(file, json.dumps(header), data, length)


def other_dtype(folder: Path, chosen: random.Random) -> None:
    """A dtype for a tensor, of the size that its shape then has."""
    file = shard(folder, chosen)
    header, data = split(file)
    name, dtype = chosen.choice(sorted(name for name in header if name != "__metadata__")), chosen.choice(DTYPES)
    count = 1
    for size in header[name]["shape"]:
        count *= size
    bits = BITS.get(
        dtype, {"BOOL": 8, "BF16": 16}.get(dtype, int("".join(filter(str.isdigit, dtype.split("_")[0])) or 16))
    )
    whole = {key: data[slice(*entry["data_offsets"])] for key, entry in header.items() if key != "__metadata__"}
    whole[name] = bytes(chosen.randrange(256) for _ in range(min(count * bits // 8, 4096))).ljust(
        count * bits // 8, b"\1"
    )
    header[name]["dtype"] = dtype
    place, parts = 0, []
    for key, part in whole.items():
        header[key]["data_offsets"] = [place, place + len(part)]
        place += len(part)
        parts.append(part)
    join(file, json.dumps(header), b"".join(parts))


def lone_dtype(folder: Path, chosen: random.Random) -> None:
    """A dtype that does not fit the size."""
    file = shard(folder, chosen)
    header, data = split(file)
    tensor_of(header, chosen)["dtype"] = (
        Raw(json.dumps(chosen.choice(DTYPES))) if chosen.random() < 0.7 else odd_value(chosen)
    )
    join(file, dumps(header), data)


def other_shape(folder: Path, chosen: random.Random) -> None:
    """A shape: of the same size, of none, or of too many."""
    file = shard(folder, chosen)
    header, data = split(file)
    entry = tensor_of(header, chosen)
    shape = entry["shape"]
    entry["shape"] = chosen.choice(
        (shape[::-1], [*shape, 1], [1, *shape], [], [0], [0, *shape], [-1], [2**62, 4], [1] * 1000, [10**30], shape[:1])
    )
    join(file, json.dumps(header), data)


def other_offsets(folder: Path, chosen: random.Random) -> None:
    """Offsets that overlap, leave gaps, run backwards or past the end."""
    file = shard(folder, chosen)
    header, data = split(file)
    entry, other = tensor_of(header, chosen), tensor_of(header, chosen)
    start, end = entry["data_offsets"]
    entry["data_offsets"] = chosen.choice(
        (
            other["data_offsets"],
            [end, start],
            [start, end + 2],
            [start + 1, end + 1],
            [0, 0],
            [start],
            [-1, 2**63],
            [2**64, 2**65],
        )
    )
    join(file, json.dumps(header), data)


def cut(folder: Path, chosen: random.Random) -> None:
    """A file that ends early, or late."""
    file = shard(folder, chosen)
    content = file.read_bytes()
    file.write_bytes(chosen.choice((content[: chosen.randrange(len(content))], content[:8], b"", content + b"\0" * 9)))


def flipped(folder: Path, chosen: random.Random) -> None:
    """Some bytes anywhere, most often of the header."""
    file = shard(folder, chosen)
    content = bytearray(file.read_bytes())
    for _ in range(chosen.choice((1, 3, 30))):
        content[chosen.randrange(chosen.choice((9, 3000, len(content))))] = chosen.randrange(256)
    file.write_bytes(content)


# The tensors


def edit(folder: Path, chosen: random.Random, change: Callable[[dict[str, Any], str], None]) -> None:
    """Changes the tensors of a file, one of them by its name."""
    file = shard(folder, chosen)
    found = load_file(file)
    change(found, chosen.choice(sorted(found)))
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, file, {"format": "pt"})


def cast(folder: Path, chosen: random.Random) -> None:
    """Another dtype for one tensor or for all."""
    dtype, every = chosen.choice(TORCH_DTYPES), chosen.random() < 0.3

    def change(found: dict[str, Any], name: str) -> None:
        for key in list(found) if every else [name]:
            found[key] = found[key].to(dtype)

    edit(folder, chosen, change)


def values(folder: Path, chosen: random.Random) -> None:
    """A number, a row, a column or a whole tensor with another value, in float16 or wider."""
    value, where = chosen.choice(VALUES), chosen.randrange(4)
    wider = chosen.choice((None, torch.float32, torch.bfloat16))

    def change(found: dict[str, Any], name: str) -> None:
        tensor = found[name] = found[name].to(wider or found[name].dtype)
        row, column = chosen.randrange(len(tensor)), chosen.randrange(tensor.shape[-1])
        held = torch.tensor(value, dtype=torch.float64).to(tensor.dtype)  # past its range it becomes infinite
        (tensor.view(-1)[:1], tensor[row], tensor[..., column], tensor)[where].fill_(held)

    edit(folder, chosen, change)


def larger(folder: Path, chosen: random.Random) -> None:
    """A tensor times a power of two, up to what float16 holds: what asks for exponents."""
    bits = chosen.randrange(-20, 16)

    def change(found: dict[str, Any], name: str) -> None:
        found[name] = (found[name].float() * 2.0**bits).clamp(-65504, 65504).half()

    edit(folder, chosen, change)


def names(folder: Path, chosen: random.Random) -> None:
    """A tensor that is missing, has another name, or is there twice under two names."""
    prefix, how = (
        chosen.choice(("", "transformer.", "base_model.model.", "model.model.", "module.")),
        chosen.randrange(5),
    )
    every = chosen.random() < 0.4

    def change(found: dict[str, Any], name: str) -> None:
        for key in list(found) if every else [name]:
            other = prefix + (key.removeprefix("model.") if chosen.random() < 0.8 else key)
            if how == 0:
                found.pop(key)
            elif how in (1, 2):
                found[other] = found.pop(key)
            else:
                found[other] = torch.full_like(found[key], 6e4) if how == 3 else found[key] * 30

    edit(folder, chosen, change)


def more(folder: Path, chosen: random.Random) -> None:
    """Tensors that a Qwen2 has not, or not always."""
    name = chosen.choice(
        (
            "model.layers.0.self_attn.o_proj.bias",
            "model.layers.0.mlp.down_proj.bias",
            "model.layers.2.mlp.down_proj.weight",
            "model.layers.1000000.input_layernorm.weight",
            "lm_head.bias",
            "score.weight",
            "classifier.weight",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.0.mlp.down_proj.weight.absmax",
            "x" * 3000,
            "",
            "中文",
        )
    )
    edit(folder, chosen, lambda found, _: found.update({name: torch.full((chosen.choice((1, 32, 1024)),), 3e4).half()}))


# The index and the folder


def index_of(folder: Path) -> Path:
    """The index; one is made for a single file."""
    index = folder / bases.INDEX
    if not index.exists():
        where = {name: "model.safetensors" for name in split(folder / "model.safetensors")[0] if name != "__metadata__"}
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def index_tree(folder: Path, chosen: random.Random) -> None:
    """Anything in the index."""
    index = index_of(folder)
    index.write_text(dumps(change_tree(json.loads(index.read_text()), chosen)), encoding="utf-8")


def index_text(folder: Path, chosen: random.Random) -> None:
    """The index's text, damaged."""
    index = index_of(folder)
    index.write_bytes(change_text(index.read_bytes(), chosen))


def index_target(folder: Path, chosen: random.Random) -> None:
    """A file in the index that is none of the folder's, or no file."""
    index = index_of(folder)
    tree = json.loads(index.read_text())
    targets: tuple[Any, ...] = (
        "",
        ".",
        "..",
        "/dev/zero",
        "/dev/null",
        "config.json",
        "../checkpoint/config.json",
        "a\0b",
    )
    targets += (
        "x" * 300,
        "no/such",
        str(folder / "model.safetensors"),
        "../elsewhere.safetensors",
        "tokenizer.json",
        None,
    )
    name = chosen.choice(sorted(tree["weight_map"]))
    for key in tree["weight_map"] if chosen.random() < 0.2 else [name]:
        tree["weight_map"][key] = chosen.choice(targets)
    if chosen.random() < 0.2:
        tree["weight_map"][odd_key(chosen, name)] = chosen.choice(targets)
    index.write_text(dumps(tree), encoding="utf-8")


def no_file(folder: Path, chosen: random.Random) -> None:
    """A pipe, a folder, a link to itself or a device in place of a file with weights or of the index."""
    files = [*sorted(folder.glob("*.safetensors")), folder / bases.INDEX, folder / "config.json"]
    change_file(chosen.choice(files), chosen)


def beside_it(folder: Path, chosen: random.Random) -> None:
    """Another file with other weights in the same folder, and who says which one counts."""
    hot = {name: torch.full_like(tensor, 6e4) for name, tensor in bases.tensors().items()}
    name = chosen.choice(
        (
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "other.safetensors",
            "consolidated.safetensors",
            "model.fp16.safetensors",
            "adapter_model.safetensors",
            "pytorch_model.bin",
        )
    )
    if name.endswith(".bin"):
        torch.save(hot, folder / name)
    else:
        save_file(hot, folder / name, {"format": "pt"})
    how = chosen.randrange(5)
    if how == 0:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    elif how == 1:
        where = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(hot, name)})
        (
            folder / chosen.choice((bases.INDEX, "pytorch_model.bin.index.json", "other.safetensors.index.json"))
        ).write_text(where)
    elif how == 2:
        adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 4, "target_modules": ["v_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
    elif how == 3:
        (folder / "model").mkdir()
        shutil.copyfile(folder / name, folder / "model" / "model.safetensors")


def linked(folder: Path, chosen: random.Random) -> None:
    """A file that is a link: to a copy, out of the folder, or through itself."""
    file = chosen.choice(sorted(folder.iterdir()))
    target = folder.parent / f"moved-{file.name}"
    if chosen.random() < 0.5:
        file.rename(target)
        os.symlink(target, file)
    else:
        file.unlink()
        os.symlink(f"{file.name}/../{file.name}", file)


DAMAGES: tuple[Damage, ...] = (
    other_tree,
    other_header_text,
    other_length,
    other_dtype,
    other_dtype,
    lone_dtype,
    other_shape,
)
DAMAGES += (
    other_offsets,
    cut,
    flipped,
    cast,
    values,
    values,
    larger,
    larger,
    names,
    names,
    more,
    index_tree,
    index_text,
)
DAMAGES += (index_target, no_file, beside_it, beside_it, linked)
#: What is run beside `certify`, and how often.
BESIDE = ((0.55, None), (0.70, "export"), (0.85, "doctor"), (0.98, "scan"), (1.0, "verify"))


def prepare(numbers: Sequence[int]) -> None:
    """Makes both checkpoints."""
    bases.sharded()


def attempt(trial: Trial) -> None:
    """Certifies a damaged checkpoint, and sometimes does something else with it."""
    chosen = trial.random
    folder = bases.placed(chosen.choice((bases.healthy, bases.sharded))(), trial.folder)
    if chosen.random() < 0.15:
        config = json.loads((folder / "config.json").read_text())
        changes = chosen.choice(
            ({"tie_word_embeddings": True}, {"architectures": ["Qwen2Model"]}, {"quantization_config": {}})
        )
        (folder / "config.json").write_text(json.dumps(config | changes))
    damage = chosen.choice(DAMAGES)
    trial.commands.append(damage.__name__)
    damage(folder, chosen)
    proofs.check(trial, folder)
    drawn = chosen.random()
    beside(trial, folder, next(what for share, what in BESIDE if drawn < share))
