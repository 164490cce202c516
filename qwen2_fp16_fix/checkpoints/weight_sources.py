"""Where the weights of a Qwen2 are read from: a loaded model, or the shards of a checkpoint, tensor by tensor.

Both sources give weights by the names of a checkpoint, say how many layers there are and of what shape, and refuse
what is not all there: CheckpointError for a checkpoint that cannot be read whole, Unbounded for numbers that are not
weights.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..patches.errors import NotQwen2Error
from ..patches.range_plan import LayerShape, layer_shapes
from ..patches.scaling import PLAIN

MODEL_TYPES = ("qwen2", "qwen2_fp16")  # the second is a strict export's
PREFIXES = ("model.", "", "transformer.")
HEADS = ("lm_head", "score", "qa_outputs", "classifier")
NORMS = ("input_layernorm", "post_attention_layernorm")
BIASED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
PROJECTIONS = (*BIASED, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NUMBERS = ("rms_norm_eps", "rope_theta")  # of config.json, besides the sizes
ROWS = 8192  # of an embedding or a head read at a time


#: The files of this project that an export's auto_map names.
OWN_CODE = ("modeling_qwen2_fp16", "configuration_qwen2_fp16")


def foreign_code(config: Mapping[str, Any]) -> str | None:
    """The class of a checkpoint's own code that its auto_map has built for it, if that is not this project's."""
    auto_map = config.get("auto_map") or {}
    for auto, target in auto_map.items() if isinstance(auto_map, dict) else [("AutoModel", auto_map)]:
        name = str(target).rpartition("--")[2]  # without the repository
        if str(auto).startswith(("AutoModel", "AutoConfig")) and name.partition(".")[0] not in OWN_CODE:
            return name
    return None


class Unbounded(Exception):
    """A weight whose values cannot be bounded: not loaded, wrapped or quantised."""


def check_shape(name: str, weight: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """The weight. Raises CheckpointError where it has another shape: broadcasting would bound something else."""
    compare_shapes(name, tuple(weight.shape), wanted)
    return weight


def compare_shapes(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raises CheckpointError where they differ."""
    if found != wanted:
        raise CheckpointError(f"{name} has shape {list(found)}, but its config asks for {list(wanted)}.")


def check_values(name: str, weight: Tensor) -> Tensor:
    """The weight. Raises Unbounded where its numbers are not all of what it stands for."""
    if weight.is_meta:
        raise Unbounded(f"{name} is not loaded")
    if type(weight) not in (nn.Parameter, Tensor):
        raise Unbounded(f"{name} is a {type(weight).__name__}, whose values cannot be bounded here")
    if weight.dtype not in FLOAT_DTYPES:  # in another type it needs its scales
        raise Unbounded(
            f"{name} is stored as {str(weight.dtype).removeprefix('torch.')}: quantised weights are not bounded"
        )
    return weight.detach()


class ModelSource:
    """The weights of a loaded model, by the names they have in a base model's checkpoint."""

    prefix = ""

    def __init__(self, root: nn.Module) -> None:
        """root: any module; its first Qwen2Model counts. Raises NotQwen2Error where there is none."""
        from ..patches.modeling_qwen2_fp16 import ORIGINAL
        from ..patches.planning import layer_shape
        from ..patches.swap import base_models

        bases = list(base_models(root, STOCK))
        if not bases:
            raise NotQwen2Error(
                f"found no Qwen2 in this {type(root).__qualname__}: pass a Qwen2 model or a checkpoint."
            )
        self.warnings = [f"it holds {len(bases)} Qwen2 models: certify each by itself"] if len(bases) > 1 else []
        base: Any = bases[0]
        if type(base).forward is not STOCK.Qwen2Model.forward:
            self.warnings.append(f"{type(base).__qualname__} has a forward of its own, which is not bounded here")
        self.base = base
        self.outputs: dict[str, Any] = {}
        for module in root.modules():
            for name in HEADS:
                head = getattr(module, name, None)
                if isinstance(head, nn.Module):
                    self.outputs.setdefault(name, head)
        self.layers = len(base.layers)
        self.shape = layer_shape(base.layers[0], getattr(base, "rotary_emb", None))
        self.intermediate: int = base.config.intermediate_size

    def layer_names(self, number: int) -> list[str]:
        """Norms, projections and their biases. Raises Unbounded for a bias that a Qwen2 does not have."""
        biased = [name for name in PROJECTIONS if self.has(f"layers.{number}.{name}.bias")]
        for name in biased:
            if name not in BIASED:
                raise Unbounded(f"{name} has a bias, which is not bounded here")
        biases = [f"{name}.bias" for name in biased]
        return [f"{name}.weight" for name in (*NORMS, *PROJECTIONS)] + biases

    def heads(self) -> list[str]:
        """The weights of the output layers."""
        return [f"{name}.weight" for name in self.outputs]

    def has(self, name: str) -> bool:
        """Whether there is such a parameter."""
        owner, _, kind = name.rpartition(".")
        return getattr(self._module(owner), kind, None) is not None

    def rows(self, name: str) -> Iterator[Tensor]:
        """The weight, some rows at a time."""
        yield from torch.split(self.read(name), ROWS)

    def read(self, name: str) -> Tensor:
        """A weight. Raises Unbounded where it is wrapped, quantised or not loaded."""
        from ..code_copies import is_plain_linear

        owner, _, kind = name.rpartition(".")
        module = self._module(owner)
        is_plain = type(module) is nn.Embedding if owner == "embed_tokens" else is_plain_linear(module)
        if not owner.endswith("norm") and not is_plain:
            raise Unbounded(f"{owner} is a {type(module).__name__}, whose weights cannot be bounded here")
        return check_values(name, getattr(module, kind))

    def _module(self, owner: str) -> Any:
        return self.outputs[owner] if owner in self.outputs else self.base.get_submodule(owner)


class FolderSource:
    """The tensors of a checkpoint, read from its safetensors shards when they are asked for."""

    def __init__(self, path: Path) -> None:
        """path: a folder, or a file with its config.json beside it. Raises CheckpointError or NotQwen2Error."""
        with reachable(path):
            folder = path if path.is_dir() else path.parent
            if not path.exists():
                raise CheckpointError(f"there is no {path}: give a checkpoint folder or a .safetensors file.")
        self.config = read_config(folder)
        self.foreign_code = foreign_code(self.config)
        self.warnings: list[str] = []
        if self.foreign_code is not None:
            self.warnings.append(
                f"its auto_map names code of its own ({self.foreign_code}): with trust_remote_code=True that is what "
                "loads, not what was looked at here"
            )
        self.layers, self.intermediate = self._size("num_hidden_layers"), self._size("intermediate_size")
        self.shape = self._shape()
        self.files = self._index(path, folder)
        self.prefix = next((p for p in PREFIXES if f"{p}norm.weight" in self.files), "model.")

    def check_complete(self, head: str | None = "lm_head.weight") -> None:
        """Raises CheckpointError where a tensor of a Qwen2 is missing or of a shape that its config does not ask for.

        head: the weight of the output layer that must be there; an lm_head may be tied. Of a quantised checkpoint,
        whose tensors have other names, only what its files or its index say is checked.
        """
        wanted = {} if self.config.get("quantization_config") else self._wanted_shapes(head)
        held: dict[Path, dict[str, tuple[int, ...]]] = {}
        for name in (*wanted, *self.files):
            file = self._file(name)
            if file not in held:
                with _opened(file) as tensors:
                    held[file] = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
            if name not in held[file]:
                raise CheckpointError(f"{file.name} does not hold {name}, which its index says: it is another's.")
            compare_shapes(name, held[file][name], wanted.get(name) or held[file][name])

    def _wanted_shapes(self, head: str | None) -> dict[str, tuple[int, ...] | None]:
        """The tensors that must be there and, where the config says it, their shapes."""
        hidden, rows = self.shape.hidden, (self._size("vocab_size"), self.shape.hidden)
        layer = layer_shapes(self.shape, self.intermediate)
        found: dict[str, tuple[int, ...] | None] = {"embed_tokens.weight": rows, "norm.weight": (hidden,)}
        for number in range(self.layers):
            found |= {f"layers.{number}.{name}": layer[name] for name in self.layer_names(number)}
        found = {f"{self.prefix}{name}": size for name, size in found.items()}
        if head and not (head == "lm_head.weight" and self.config.get("tie_word_embeddings", False)):
            found[head] = rows if head == "lm_head.weight" else None  # a classifier's rows are its labels
        return found

    def _index(self, path: Path, folder: Path) -> dict[str, Path]:
        """Tensor name to the shard that holds it."""
        index = folder / "model.safetensors.index.json"
        if path.is_dir() and index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
                raise CheckpointError(f"{index.name} has no weight_map from tensors to files: it is damaged.")
            return {name: folder / file for name, file in shards.items()}
        file = path if path.is_file() else folder / "model.safetensors"
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{file.name} is no .safetensors file: convert the checkpoint to safetensors.")
        if not file.is_file():
            hint = " (it has .bin files: convert them to safetensors)" if list(folder.glob("*.bin")) else ""
            raise CheckpointError(f"{folder} has no model.safetensors and no index of shards{hint}.")
        with _opened(file) as tensors:
            return dict.fromkeys(tensors.keys(), file)

    def _size(self, key: str, default: int | None = None) -> int:
        """A size from config.json; `default` where it is absent or null. Raises CheckpointError unless above 0."""
        found = self.config.get(key)
        found = default if found is None else found
        if type(found) is not int or found < 1:
            raise CheckpointError(f"config.json has {key} = {found!r}, not a whole number above 0.")
        return found

    def _shape(self) -> LayerShape:
        """Sizes of the layers, as config.json gives them."""
        hidden, heads = self._size("hidden_size"), self._size("num_attention_heads")
        kv_heads, positions = self._size("num_key_value_heads", heads), self._size("max_position_embeddings", 32768)
        head_dim = self._size("head_dim", hidden // heads)
        if heads % kv_heads or head_dim % 2:
            raise CheckpointError(
                f"config.json has {heads} heads for {kv_heads} key heads, {head_dim} wide: no Qwen2 has."
            )
        scaling = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        try:
            scale = rotation_scale(scaling, positions)
        except (AttributeError, TypeError, ValueError, ZeroDivisionError):
            raise CheckpointError(f"config.json has a rope scaling that cannot be read: {scaling!r}.") from None
        for place in (self.config, scaling):
            for key in NUMBERS:
                _check_number(key, place.get(key))
        activation = str(self.config.get("hidden_act", "silu"))
        return LayerShape(hidden, heads, kv_heads, head_dim, positions, activation, scale)

    def layer_names(self, number: int) -> list[str]:
        """Norms, projections and the three biases a Qwen2 has: a checkpoint without one is incomplete."""
        return [f"{name}.weight" for name in (*NORMS, *PROJECTIONS)] + [f"{name}.bias" for name in BIASED]

    def heads(self) -> list[str]:
        """The weights of the output layers. With tied embeddings and a head, releases differ in which one they use."""
        tied = bool(self.config.get("tie_word_embeddings", False))
        generates = any("CausalLM" in str(name) for name in self.config.get("architectures") or ())
        found = [f"{name}.weight" for name in HEADS if self.has(f"{name}.weight")]
        if tied:
            found.append(f"{self.prefix}embed_tokens.weight")
        elif generates and "lm_head.weight" not in found:
            found.append("lm_head.weight")  # its absence is what reading it reports
        return found

    def has(self, name: str) -> bool:
        """Whether the checkpoint has such a tensor."""
        return name in self.files

    def rows(self, name: str) -> Iterator[Tensor]:
        """A tensor, some rows at a time."""
        with _opened(self._file(name)) as tensors:
            stored = tensors.get_slice(name)
            if len(stored.get_shape()) != 2:
                raise CheckpointError(f"{name} has shape {stored.get_shape()}, not rows and columns.")
            for start in range(0, stored.get_shape()[0], ROWS):
                yield check_values(name, stored[start : start + ROWS])

    def read(self, name: str) -> Tensor:
        """A tensor. Raises CheckpointError where it is missing or damaged, Unbounded where it is quantised."""
        quantised = self.config.get("quantization_config")
        if quantised and "_proj" in name:
            method = quantised.get("quant_method", "") if isinstance(quantised, dict) else ""
            raise Unbounded(f"the checkpoint is quantised ({method or 'unnamed method'}): its kernels are not bounded")
        with _opened(self._file(name)) as tensors:
            return check_values(name, tensors.get_tensor(name))

    def _file(self, name: str) -> Path:
        if name not in self.files:
            raise CheckpointError(
                f"the checkpoint has no tensor {name}: it is incomplete, or its config.json another's."
            )
        return self.files[name]


WeightSource = ModelSource | FolderSource


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint. Raises CheckpointError, or NotQwen2Error where it is another model's."""
    with reachable(folder):
        found = (folder / "config.json").is_file()
    if not found:
        raise CheckpointError(f"{folder} has no config.json: it is no checkpoint, or an unfinished download.")
    config = read_json(folder / "config.json")
    if config.get("model_type") not in MODEL_TYPES:
        raise NotQwen2Error(f"{folder} holds a model of type {config.get('model_type')!r}, not 'qwen2'.")
    check_architectures(config)
    return config


def check_architectures(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless they are a list of names, or none."""
    found = config.get("architectures")
    if found is not None and not (isinstance(found, list) and all(isinstance(name, str) for name in found)):
        raise CheckpointError(f"config.json has architectures = {found!r}, not a list of names.")


@contextmanager
def reachable(path: Path) -> Iterator[None]:
    """Around questions about a path that the system may refuse to answer. Raises CheckpointError for that."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): change the rights, or name another folder."
        ) from None


def _check_number(key: str, found: Any) -> None:
    """Raises CheckpointError for what a model would fail at later, in arithmetic; null is a default."""
    if found is not None and (type(found) not in (int, float) or not 0 <= found < math.inf):
        raise CheckpointError(f"config.json has {key} = {found!r}, not a finite number from 0.")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file; what is wrong with it becomes one sentence."""
    try:
        with safetensors.safe_open(file, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError:
        raise CheckpointError(f"the shard {file.name} is missing: the download is unfinished.") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name} cannot be read ({error}): it is damaged or half written.") from None


def read_json(path: Path) -> dict[str, Any]:
    """A file with a JSON object. Raises CheckpointError."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text, parse_constant=_finite_number, parse_float=_finite_number)
    except ValueError as error:
        raise CheckpointError(f"{path.name} is not valid JSON ({error}).") from None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror}).") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path.name} is not a JSON object.")
    return found


def _finite_number(text: str) -> float:
    """Raises ValueError for NaN and infinity, which Python's JSON knows and no other's."""
    found = float(text)
    if not math.isfinite(found):
        raise ValueError(f"{text} is no finite number")
    return found


def rotation_scale(scaling: Mapping[str, Any], positions: int = 0) -> float:
    """What yarn (Peng et al. 2023, eq. 22) and longrope multiply cos and sin by; 1 for the others.

    Releases differ in whether they take the factor as written or from `positions`, the longest context, and old ones
    do not scale: the largest of these bounds them all.
    """
    kind, original = scaling.get("rope_type", scaling.get("type")), scaling.get("original_max_position_embeddings")
    if kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.get("attention_factor") is not None:
        return max(1.0, float(scaling["attention_factor"]))
    factor = max(1.0, float(scaling.get("factor") or 1.0), positions / original if original else 1.0)
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original or positions or 32768))
    plain = 0.1 * math.log(factor) + 1
    if not scaling.get("mscale") or not scaling.get("mscale_all_dim"):
        return plain
    whole = 0.1 * float(scaling["mscale_all_dim"]) * math.log(factor) + 1
    return max(1.0, plain, (0.1 * float(scaling["mscale"]) * math.log(factor) + 1) / whole)
