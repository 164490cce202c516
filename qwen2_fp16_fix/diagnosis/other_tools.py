"""Other tools that change Qwen2 models or how they run: what is installed, and what has been replaced already."""

import inspect
import re
import sys
from importlib import import_module, metadata
from typing import NamedTuple

#: Distribution to the module it is imported as.
KNOWN = {
    "liger-kernel": "liger_kernel",
    "unsloth": "unsloth",
    "peft": "peft",
    "accelerate": "accelerate",
    "vllm": "vllm",
}

QWEN2 = "transformers.models.qwen2.modeling_qwen2"
RELIED_ON = re.compile(r"Qwen2(Model|ForCausalLM|DecoderLayer|MLP|RMSNorm|RotaryEmbedding|\w*Attention\w*)")
OURS = ("transformers.", "transformers_modules.", __name__.partition(".")[0])


class Tool(NamedTuple):
    """A tool that is installed, or imported without being so."""

    name: str
    version: str | None
    imported: bool
    replaced: tuple[str, ...]  # Qwen2 classes that are its own in this process


def tools() -> list[Tool]:
    """The known tools that are here, and any unknown module that has replaced a Qwen2 class."""
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
    """Name of each class of transformers' Qwen2 that the fix relies on and another module has replaced or patched."""
    try:
        stock = import_module(QWEN2)
    except ImportError:  # transformers before 4.37
        return {}
    found = {}
    for name, part in vars(stock).items():
        if isinstance(part, type) and RELIED_ON.fullmatch(name):
            forward = inspect.unwrap(getattr(part, "forward", part))
            foreign = [thing.__module__ for thing in (part, forward) if not thing.__module__.startswith(OURS)]
            if foreign:
                found[name] = foreign[0]
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
