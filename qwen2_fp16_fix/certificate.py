"""The certificate: whether any prompt can make a checkpoint overflow in float16, from its weights, layer by layer.

`certify` returns plain data; `render` shows it. A checkpoint is read layer by layer; no model is built.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from .patches.errors import CheckpointError, NotQwen2Error
from .patches.range_plan import (
    Exponents,
    LayerBounds,
    LayerShape,
    bound_layer,
    bound_logits,
    headroom_bits,
    plan_layer,
    unproven_sites,
)

SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal
PREFIXES = ("model.", "", "transformer.")
PROJECTIONS = {
    "self_attn.q_proj": ("weight", "bias"),
    "self_attn.k_proj": ("weight", "bias"),
    "self_attn.v_proj": ("weight", "bias"),
    "self_attn.o_proj": ("weight",),
    "mlp.gate_proj": ("weight",),
    "mlp.up_proj": ("weight",),
    "mlp.down_proj": ("weight",),
}


def certify(model_or_path: nn.Module | str | Path, progress: Console | None = None) -> dict[str, Any]:
    """Bounds every float16 number of a Qwen2 and says whether, with the fix, any prompt can overflow it.

    model_or_path: a loaded model with a Qwen2Model inside, a checkpoint folder, or a .safetensors file with config.json
    beside it. Returns a dict fit for JSON: `proven`, `verdict` (a sentence), `reasons`, `layers` (for each its
    `exponents`, `bounds`, `headroom_bits`, whether `stock` needs no exponent, and `reasons`), `logits`,
    `casting` (what the cast of the stored weights to float16 loses, by tensor, where it loses anything), `seconds`.
    Bounds are in units of the values themselves; the float16 range ends at 65504.
    Raises CheckpointError for a folder or file that cannot be read whole, NotQwen2Error for another architecture.
    """
    started = time.monotonic()
    if isinstance(model_or_path, nn.Module):
        source: ModelSource | FolderSource = ModelSource(model_or_path)
    else:
        source = FolderSource(Path(model_or_path))
    casting: dict[str, dict[str, int]] = {}

    def read(name: str) -> Tensor:
        stored = source.read(name)
        cast = stored.half()
        lost = casting_losses(stored, cast)
        if any(lost.values()):
            casting[name] = {**lost, "total": stored.numel()}
        return cast

    numbers = range(source.config["num_hidden_layers"])
    if progress is not None:
        numbers = track(numbers, "bounding layers", console=progress)  # type: ignore[assignment]
    layers = [certify_layer(number, read, source) for number in numbers]
    head = "lm_head.weight" if source.has("lm_head.weight") else f"{source.prefix}embed_tokens.weight"
    logits = bound_logits(read(f"{source.prefix}norm.weight"), read(head))
    reasons = [f"layer {layer['layer']}: {reason}" for layer in layers for reason in layer["reasons"]]
    if math.isinf(logits) or logits > 65504 / 2:
        reasons.append(f"logits: bound {logits:.3g}")
    reasons += [f"{name}: {lost['overflow']} weights pass 65504" for name, lost in casting.items() if lost["overflow"]]
    scaled = sum(max(layer["exponents"].values(), default=0) > 0 for layer in layers)
    return {
        "proven": not reasons,
        "verdict": _verdict(reasons, len(layers), scaled),
        "reasons": reasons,
        "layers": layers,
        "logits": logits,
        "casting": casting,
        "seconds": round(time.monotonic() - started, 2),
    }


def _verdict(reasons: list[str], layers: int, scaled: int) -> str:
    if reasons:
        return f"Not provable: {reasons[0]}" + (f", and {len(reasons) - 1} more." if len(reasons) > 1 else ".")
    return (
        f"Proven: with the fix, no prompt can make this checkpoint overflow in float16 ({layers} layers, {scaled} of "
        "them with an exponent above 0)."
    )


def certify_layer(number: int, read: Callable[[str], Tensor], source: "ModelSource | FolderSource") -> dict[str, Any]:
    """The bounds of one layer, its exponents and what they leave unproven."""
    names = [f"{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
    names += [f"{projection}.{kind}" for projection, kinds in PROJECTIONS.items() for kind in kinds]
    try:
        weights = {name: read(f"{source.prefix}layers.{number}.{name}") for name in names}
        bounds = bound_layer(weights, source.shape())
    except Unbounded as reason:
        return {
            "layer": number,
            "exponents": {},
            "bounds": {},
            "headroom_bits": {},
            "stock": False,
            "reasons": [str(reason)],
        }
    except RuntimeError as error:  # torch's, for shapes that do not fit
        raise CheckpointError(f"layer {number} does not have the shapes of its config.json: {error}.") from None
    exponents = plan_layer(bounds)
    unproven = unproven_sites(bounds, exponents)
    return {
        "layer": number,
        "exponents": exponents._asdict(),
        "bounds": asdict(bounds),
        "headroom_bits": headroom_bits(bounds, exponents),
        "stock": not unproven_sites(bounds, Exponents(0, 0)),
        "reasons": [_reason(site, bounds, exponents) for site in unproven],
    }


def _reason(site: str, bounds: LayerBounds, exponents: Exponents) -> str:
    bound = asdict(bounds)[site]
    missing = -headroom_bits(bounds, exponents)[site]
    short = "" if not math.isfinite(missing) else f", {missing:.1f} bits too large"
    return f"{site} is bounded by {bound:.3g} only{short}"


def casting_losses(stored: Tensor, cast: Tensor) -> dict[str, int]:
    """What casting a weight to float16 did to it: how many became infinite, zero, or subnormal that were not."""
    if stored.dtype == torch.float16:
        return {"overflow": 0, "flushed": 0, "subnormal": 0}
    zeros = cast.numel() - int(cast.count_nonzero())
    small = int((cast.abs() < SMALLEST_NORMAL).sum())
    return {
        "overflow": int(cast.isinf().sum()) - int(stored.isinf().sum()),
        "flushed": zeros - (stored.numel() - int(stored.count_nonzero())),
        "subnormal": small - zeros,
    }


class Unbounded(Exception):
    """A weight of a loaded model that has no values to bound."""


class ModelSource:
    """The weights of a loaded model, by the names they have in a checkpoint."""

    prefix = ""

    def __init__(self, root: nn.Module) -> None:
        """root: any module; its first Qwen2Model counts. Raises NotQwen2Error where there is none."""
        from .patches.modeling_qwen2_fp16 import ORIGINAL
        from .patches.planning import layer_shape
        from .patches.swap import base_models

        bases = list(base_models(root, ORIGINAL))
        if not bases:
            raise NotQwen2Error(
                f"found no Qwen2 in this {type(root).__qualname__}: pass a Qwen2 model or a checkpoint."
            )
        heads = [getattr(module, "lm_head", None) for module in root.modules()]
        self.head = next((head for head in heads if isinstance(head, nn.Linear)), None)
        base: Any = bases[0]
        self.base = base
        self.config: dict[str, Any] = base.config.to_dict()
        self.layer_shape = layer_shape(base, base.layers[0])

    def shape(self) -> LayerShape:
        """Sizes of the layers."""
        return self.layer_shape

    def has(self, name: str) -> bool:
        """Whether there is a head of its own."""
        return name == "lm_head.weight" and self.head is not None

    def read(self, name: str) -> Tensor:
        """A weight. Raises Unbounded where it is wrapped, quantised or not loaded."""
        if name == "lm_head.weight":
            assert self.head is not None
            return self.head.weight.detach()
        owner, _, kind = name.rpartition(".")
        module = self.base.get_submodule(owner)
        if "_proj" in owner and type(module) is not nn.Linear:
            raise Unbounded(
                f"{owner.partition('.')[2]} is a {type(module).__name__}, whose weights cannot be bounded here"
            )
        weight: Tensor = getattr(module, kind)
        if weight.is_meta:
            raise Unbounded(f"{name} is not loaded")
        return weight.detach()


class FolderSource:
    """The tensors of a checkpoint, read from its safetensors shards when they are asked for."""

    def __init__(self, path: Path) -> None:
        """path: a folder, or a file with its config.json beside it. Raises CheckpointError or NotQwen2Error."""
        folder = path if path.is_dir() else path.parent
        if not path.exists():
            raise CheckpointError(f"there is no {path}: give a checkpoint folder or a .safetensors file.")
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json: it is no checkpoint, or an unfinished download.")
        self.config = _json(folder / "config.json")
        if self.config.get("model_type") != "qwen2":
            raise NotQwen2Error(f"{folder} holds a model of type {self.config.get('model_type')!r}, not 'qwen2'.")
        self.files = self._index(path, folder)
        self.prefix = next((p for p in PREFIXES if f"{p}norm.weight" in self.files), "model.")

    def _index(self, path: Path, folder: Path) -> dict[str, Path]:
        """Tensor name to the shard that holds it."""
        index = folder / "model.safetensors.index.json"
        if path.is_dir() and index.is_file():
            return {name: folder / file for name, file in _json(index).get("weight_map", {}).items()}
        file = path if path.is_file() else folder / "model.safetensors"
        if not file.is_file():
            hint = " (it has .bin files: convert them to safetensors)" if list(folder.glob("*.bin")) else ""
            raise CheckpointError(f"{folder} has no model.safetensors and no index of shards{hint}.")
        with _opened(file) as tensors:
            return dict.fromkeys(tensors.keys(), file)

    def shape(self) -> LayerShape:
        """Sizes of the layers, as config.json gives them."""
        config = self.config
        try:
            heads = config["num_attention_heads"]
            return LayerShape(
                hidden=config["hidden_size"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                positions=config.get("max_position_embeddings", 32768),
                activation=config.get("hidden_act", "silu"),
                rotation_scale=rotation_scale(config.get("rope_parameters") or config.get("rope_scaling") or {}),
            )
        except KeyError as key:
            raise CheckpointError(f"config.json has no {key}.") from None

    def has(self, name: str) -> bool:
        """Whether the checkpoint has such a tensor."""
        return name in self.files

    def read(self, name: str) -> Tensor:
        """A tensor. Raises CheckpointError where it or its shard is missing or damaged."""
        if name not in self.files:
            raise CheckpointError(
                f"the checkpoint has no tensor {name}: it is incomplete, or its config.json another's."
            )
        with _opened(self.files[name]) as tensors:
            found: Tensor = tensors.get_tensor(name)
            return found


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


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON ({error}).") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path.name} is not a JSON object.")
    return found


def rotation_scale(scaling: dict[str, Any]) -> float:
    """What yarn (Peng et al. 2023, eq. 22) and longrope multiply cos and sin by; 1 for the others."""
    kind, factor = scaling.get("rope_type", scaling.get("type")), float(scaling.get("factor") or 1.0)
    if scaling.get("attention_factor"):
        return float(scaling["attention_factor"])
    if kind == "yarn":
        return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    if kind == "longrope" and factor > 1:
        return math.sqrt(1 + math.log(factor) / math.log(scaling.get("original_max_position_embeddings") or 32768))
    return 1.0


def render(certificate: dict[str, Any], console: Console) -> None:
    """Prints the table of bounds, what the cast loses, and the verdict."""
    table = Table("layer", "tightest site", "bound", "headroom, bits", "2^-e MLP", "2^-e o_proj", "stock in range")
    for layer in certificate["layers"]:
        if not layer["bounds"]:
            table.add_row(str(layer["layer"]), "; ".join(layer["reasons"]), "", "", "", "", "")
            continue
        site, bits = min(layer["headroom_bits"].items(), key=lambda item: item[1])
        table.add_row(
            str(layer["layer"]),
            site,
            f"{layer['bounds'][site]:,.4g}",
            f"{bits:.1f}",
            str(layer["exponents"]["mlp"]),
            str(layer["exponents"]["o_proj"]),
            "yes" if layer["stock"] else "no",
        )
    console.print(table)
    for name, lost in certificate["casting"].items():
        parts = [f"{count} {what}" for what, count in lost.items() if what != "total" and count]
        console.print(f"{name}: cast to float16, {', '.join(parts)} of {lost['total']}", highlight=False)
    console.print(f"logits are bounded by {certificate['logits']:,.4g}\n{certificate['verdict']}", highlight=False)
