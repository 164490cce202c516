"""The environment of a model: other tools that change Qwen2, and settings of torch that change its numbers."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any, NamedTuple

import torch

from ..patches.replaced import FUNCTIONS, foreign_part, home_of
from ..results import Record
from ..translations import DOCTOR_TEXTS
from .devices import Device
from .remarks import Remark, in_words, remark

#: Distribution to the module it is imported as.
KNOWN = {
    "liger-kernel": "liger_kernel",
    "unsloth": "unsloth",
    "peft": "peft",
    "accelerate": "accelerate",
    "vllm": "vllm",
}

QWEN2_MODULE = "transformers.models.qwen2.modeling_qwen2"
RELIED_ON = re.compile(r"Qwen2(Model|ForCausalLM|DecoderLayer|MLP|RMSNorm|RotaryEmbedding|\w*Attention\w*)")
OURS = ("transformers.", "transformers_modules.", __name__.partition(".")[0])


class Tool(NamedTuple):
    """A tool that is installed or imported."""

    name: str
    version: str | None
    imported: bool
    replaced: tuple[str, ...]  # the Qwen2 classes that it has replaced in this process


def tools() -> list[Tool]:
    """The known tools that are installed or imported, and every other module that has replaced a Qwen2 class."""
    replaced = replaced_classes()
    found = []
    for name, module in KNOWN.items():
        version, imported = _version(name), module in sys.modules
        taken = tuple(qwen2 for qwen2, origin in replaced.items() if origin.partition(".")[0] == module)
        if version is not None or imported or taken:
            found.append(Tool(name, version, imported, taken))
    for origin in sorted({o.partition(".")[0] for o in replaced.values()} - set(KNOWN.values())):
        taken = tuple(qwen2 for qwen2, by in replaced.items() if by.partition(".")[0] == origin)
        found.append(Tool(origin, None, True, taken))
    return found


def replaced_classes() -> dict[str, str]:
    """Classes and functions of transformers' Qwen2 that another module has replaced or patched, with that module."""
    try:
        stock = import_module(QWEN2_MODULE)
    except ImportError:  # transformers before 4.37
        return {}
    found = {}
    for name, part in vars(stock).items():
        if isinstance(part, type) and RELIED_ON.fullmatch(name):
            by = part if not part.__module__.startswith(OURS) else foreign_part(getattr(part, "forward", None))
        elif name in FUNCTIONS:
            by = foreign_part(part)
        else:
            continue
        if by is not None:
            found[name] = home_of(by)
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class ToolFacts(Record):
    """A tool, and its effect on the fix."""

    name: str
    version: str | None
    imported: bool
    replaced: list[str]  # the Qwen2 classes that the tool has replaced in this process
    text: str


def examine_tools(language: str) -> tuple[list[ToolFacts], list[Remark], list[Remark]]:
    """The tools that are here, those that have replaced a class of Qwen2 as findings, and no warnings."""
    facts, findings = [], []
    for tool in tools():
        code = f"tool.{tool.name}"
        effect = remark(code if code in DOCTOR_TEXTS[language] else "tool.other")
        if tool.replaced:
            effect = remark("tool.replaced", tool=tool.name, classes=", ".join(tool.replaced))
            findings.append(effect)
        facts.append(ToolFacts(tool.name, tool.version, tool.imported, list(tool.replaced), in_words(effect, language)))
    return facts, findings, []


matmul: Any = torch.backends.cuda.matmul
cuda: Any = torch.backends.cuda
backends: Any = torch.backends
#: What reads it if old and new names for the precision of float32 products have been mixed in a program.
MIXED = "old and new names mixed"


class Setting(NamedTuple):
    """One setting."""

    name: str  # as a program writes it
    value: Any  # None if this torch has no such setting
    matters: str  # which promise of a fixed model it touches: "finiteness", "closeness", "stock only" or "no"
    risky: bool = False  # with this value a fixed model could overflow
    text: str = ""  # the code of its sentence, if that is not the end of its name


def settings() -> list[Setting]:
    """Every setting that matters, and some that are often suspected and do not matter."""
    prefix = "torch.backends.cuda"
    return [
        *math_kernel(),
        Setting(
            f"{prefix}.matmul.allow_fp16_accumulation", _value(lambda: matmul.allow_fp16_accumulation), "closeness"
        ),
        Setting(
            f"{prefix}.matmul.allow_fp16_reduced_precision_reduction",
            _value(lambda: matmul.allow_fp16_reduced_precision_reduction),
            "closeness",
        ),
        Setting(
            f"{prefix}.matmul.allow_bf16_reduced_precision_reduction",
            _value(lambda: matmul.allow_bf16_reduced_precision_reduction),
            "closeness",
        ),
        *float32_products(),
        Setting("torch.autocast", autocast_here(), "stock only"),
    ]


def math_kernel() -> list[Setting]:
    """Whether sdpa may take its math kernel, and whether that keeps float16 scores: before torch 2.5 it always does."""
    reduced, allowed = "torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp", "torch.backends.cuda.enable_math_sdp"
    halved, fallback = (
        _value(lambda: cuda.fp16_bf16_reduction_math_sdp_allowed()),
        _value(lambda: cuda.math_sdp_enabled()),
    )
    if halved is None:
        return [Setting(allowed, fallback, "finiteness", risky=bool(fallback), text="setting.math_sdp_before_2_5")]
    return [
        Setting(reduced, halved, "finiteness", risky=bool(halved and fallback)),
        Setting(allowed, fallback, "no"),
    ]


def float32_products() -> list[Setting]:
    """How float32 products may be rounded: in TF32, which a fixed model does not notice, or in bfloat16, which it does.

    From torch 2.9 on each backend has a name of its own; what is set for all of them is read there, too.
    """
    on_cpus = _value(lambda: backends.mkldnn.matmul.fp32_precision)
    asked = _value(torch.get_float32_matmul_precision)
    in_bfloat16 = "closeness" if on_cpus == "bf16" or asked == "medium" else "no"
    return [
        Setting("torch.set_float32_matmul_precision", MIXED if asked is None else asked, in_bfloat16),
        Setting("torch.backends.mkldnn.matmul.fp32_precision", on_cpus, in_bfloat16),
        Setting("torch.backends.cuda.matmul.allow_tf32", _tf32_allowed(), "no"),
        Setting(
            "torch.backends.cuda.matmul.fp32_precision",
            _value(lambda: matmul.fp32_precision),
            "no",
            text="setting.cuda_fp32_precision",
        ),
        Setting("NVIDIA_TF32_OVERRIDE", os.environ.get("NVIDIA_TF32_OVERRIDE", "unset"), "no"),
    ]


def _tf32_allowed() -> Any:
    """As torch says, and MIXED where it refuses to."""
    found = _value(lambda: matmul.allow_tf32)
    return MIXED if found is None else found


def _value(read: Callable[[], Any]) -> Any:
    """A setting's value. None if this torch lacks it, or refuses to answer because old and new names were mixed."""
    try:
        found = read()
    except (AttributeError, RuntimeError):
        return None
    return list(found) if isinstance(found, tuple) else found


def autocast_here() -> str:
    """The device types with autocast on, each with its dtype, or "off"."""
    kinds = [kind for kind in ("cuda", "mps", "cpu") if torch.amp.is_autocast_available(kind)]
    on = [kind for kind in kinds if torch.is_autocast_enabled(kind)]
    return ", ".join(f"{kind} {str(torch.get_autocast_dtype(kind)).removeprefix('torch.')}" for kind in on) or "off"


@dataclass(frozen=True)
class SettingFacts(Record):
    """A setting, and its effect on a fixed model here."""

    name: str
    value: Any
    matters: str
    risky: bool
    applies: bool  # to the devices here; a terminal shows no others
    text: str


def examine_settings(
    hardware: Sequence[Device], language: str
) -> tuple[list[SettingFacts], list[Remark], list[Remark]]:
    """The settings, no findings, and the risky settings as warnings."""
    kinds = {device.kind for device in hardware}
    facts, warnings = [], []
    for item in settings():
        effect = remark(item.text or f"setting.{item.name.rpartition('.')[2]}")
        if item.risky:
            warnings.append(effect)
        applies = concerns(item.name, kinds)
        said = in_words(effect, language)
        facts.append(SettingFacts(item.name, item.value, item.matters, item.risky, applies=applies, text=said))
    return facts, [], warnings


def concerns(name: str, kinds: set[str]) -> bool:
    """Whether a setting affects what runs on devices of these kinds. The CPU counts where it is the only one."""
    if name.startswith("NVIDIA_"):
        return "cuda" in kinds
    if ".cuda.matmul." in name:
        return bool(kinds & {"cuda", "rocm"})
    return ".mkldnn." not in name or kinds <= {"cpu"}
