"""The config.json of a checkpoint, checked: which model it is of, its sizes, and the code that loads it."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packaging.version import Version

from ..errors import CheckpointError, quoted
from ..files import reading
from ..patches.architecture import QWEN2
from ..patches.errors import NotQwen2Error
from ..patches.range_bounds import LayerShape
from .rotary import check_rotary, groups, rotation_scale

MODEL_TYPES = QWEN2.model_types
STRICT = MODEL_TYPES[1]  # of an export that loads with its own code only
#: The files of this project that an export's auto_map names.
OWN_CODE = ("modeling_qwen2_fp16", "configuration_qwen2_fp16")
#: By these every release reads another file, or one setting for another.
ELSEWHERE = ("configuration_files", "attribute_map")
ADAPTER = "{} holds a PEFT adapter: merge it (merge_and_unload) and save the merged model."


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint. Raises CheckpointError, or NotQwen2Error if it is another model's."""
    with reachable(folder):
        problem = None if (folder / "config.json").is_file() else _without_config(folder)
    if problem is not None:
        raise CheckpointError(problem)
    config = read_json(folder / "config.json")
    if config.get("model_type") not in MODEL_TYPES:
        raise NotQwen2Error(f"{folder} holds a model of type {quoted(config.get('model_type'))}, not 'qwen2'.")
    check_architectures(config)
    for key in ELSEWHERE:
        if config.get(key):
            raise CheckpointError(
                f"config.json has {key}, so transformers takes other settings: remove it and write the settings here."
            )
    return config


def _without_config(folder: Path) -> str:
    """What a folder without a config.json is, as far as its files show."""
    if (folder / "adapter_config.json").is_file():
        return ADAPTER.format(folder)
    if any(folder.glob("*.gguf")):
        return f"{folder} holds GGUF files, which are not read here: give the original checkpoint in safetensors."
    return f"{folder} has no config.json: it is not a checkpoint, or its download is unfinished."


def read_json(path: Path) -> dict[str, Any]:
    """A file with a JSON object. Raises CheckpointError."""
    return reading.read_json(path, "another checkpoint", CheckpointError, name=path.name)


@contextmanager
def reachable(path: Path) -> Iterator[None]:
    """For a block that asks the system about a path. Raises CheckpointError if the system refuses to answer."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): change its permissions, or name another folder."
        ) from None


# Classes and code


def check_architectures(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless they are a list of names, or none."""
    found = config.get("architectures")
    if found is not None and not (isinstance(found, list) and all(isinstance(name, str) for name in found)):
        raise CheckpointError(f"config.json has architectures = {quoted(found)}, not a list of names.")


def generates(config: Mapping[str, Any], unnamed: bool) -> bool:
    """Whether an architecture of the config predicts tokens. unnamed: the answer if the config names none."""
    names = config.get("architectures")
    return any("CausalLM" in str(name) for name in names) if names else unnamed


def code_named(config: Mapping[str, Any]) -> dict[str, str]:
    """Auto class to the module and class in the config's auto_map. The repository is left out: it names a user."""
    auto_map = config.get("auto_map")
    named = auto_map if isinstance(auto_map, dict) else {}
    return {str(auto): _without_repository(target) for auto, target in named.items()}


def _without_repository(target: Any) -> str:
    """`module.Class`, of that or of `OWNER/NAME--module.Class`."""
    return str(target).rpartition("--")[2]


def foreign_code(config: Mapping[str, Any]) -> str | None:
    """The first class in the config's auto_map that builds the model and is not this project's."""
    auto_map = config.get("auto_map") or {}
    named = code_named(config) if isinstance(auto_map, dict) else {"AutoModel": _without_repository(auto_map)}
    for auto, name in named.items():
        if auto.startswith(("AutoModel", "AutoConfig")) and name.partition(".")[0] not in OWN_CODE:
            return name
    return None


def is_exported(config: Mapping[str, Any]) -> bool:
    """Whether the config is an export's: by its model type, which only a strict one has, or by the code it names."""
    modules = {name.partition(".")[0] for name in code_named(config).values()}
    return config.get("model_type") == STRICT or OWN_CODE[0] in modules


def builds_own_model(config: Mapping[str, Any]) -> bool:
    """Whether AutoModel builds this project's class by the config's auto_map. Every export has it."""
    return code_named(config).get("AutoModel", "").partition(".")[0] == OWN_CODE[0]


def dtype_keyword(transformers_version: str) -> str:
    """The keyword of from_pretrained for a model's dtype, in that release of transformers."""
    return "dtype" if Version(transformers_version) >= Version("4.56") else "torch_dtype"


# Sizes


def read_size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A size from a config; `default` if it is absent or null. Raises CheckpointError unless it is above 0."""
    found = config.get(key)
    found = default if found is None else found
    if type(found) is not int or found < 1:
        raise CheckpointError(f"config.json has {key} = {quoted(found)}, not a whole number above 0.")
    return found


def read_shape(config: Mapping[str, Any]) -> LayerShape:
    """The sizes of a layer. Raises CheckpointError if no Qwen2 has such sizes."""
    hidden, heads = read_size(config, "hidden_size"), read_size(config, "num_attention_heads")
    kv_heads = read_size(config, "num_key_value_heads", heads)
    positions = read_size(config, "max_position_embeddings", 32768)
    head_dim = read_size(config, "head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise CheckpointError(
            f"config.json has {heads} heads for {kv_heads} key heads, {head_dim} wide: no Qwen2 has such sizes."
        )
    _check_number("rms_norm_eps", config.get("rms_norm_eps"))
    for group in groups(config):
        _check_number("rope_theta", group.get("rope_theta"))
    check_rotary(config, head_dim // 2)
    activation = str(config.get("hidden_act", "silu"))
    return LayerShape(hidden, heads, kv_heads, head_dim, positions, activation, rotation_scale(config))


def _check_number(key: str, found: Any) -> None:
    """Raises CheckpointError for a number that would fail later, in a model's arithmetic. null means the default."""
    if found is not None and (type(found) not in (int, float) or not 0 <= found < math.inf):
        raise CheckpointError(f"config.json has {key} = {quoted(found)}, not a finite number of at least 0.")
