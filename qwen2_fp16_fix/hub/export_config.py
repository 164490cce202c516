"""The config.json of an exported checkpoint. It tells transformers, and engines built on it, which code to run."""

import re
from collections.abc import Mapping
from typing import Any

from ..checkpoints.config import OWN_CODE, STRICT
from ..errors import ExportError, quoted
from ..patches.architecture import QWEN2

MODELS, CONFIGURATION = OWN_CODE

#: By Auto class, the end of its classes' names and the weight that its head must have. vLLM builds `AutoModel`, and
#: silently runs the stock class if `auto_map` lacks it.
AUTO_CLASSES = {head.auto_class: (head.suffix, head.weight) for head in QWEN2.heads}
HEAD_WEIGHTS = dict(AUTO_CLASSES.values())  # by the end of the class's name


def exported_config(
    config: Mapping[str, Any], strict: bool, code_repo: str | None, tokenizer: str | None
) -> dict[str, Any]:
    """The config with an `auto_map`, and with names of architectures for which no engine has its own class.

    code_repo: OWNER/NAME of the repository with the code; None for the folder itself. tokenizer: the name of its class;
    without it `pipeline` loads no tokenizer for an unknown model type in 4.37 to 4.52.
    Raises ExportError if the checkpoint names other code or another architecture.
    """
    check_foreign_code(config, "config.json")
    prefix, source = "Qwen2FP16Strict" if strict else "Qwen2FP16", f"{code_repo}--" if code_repo else ""
    auto_map = {auto: f"{source}{MODELS}.{prefix}{end}" for auto, (end, _) in AUTO_CLASSES.items()}
    if strict:
        auto_map = {"AutoConfig": f"{source}{CONFIGURATION}.Qwen2FP16Config"} | auto_map
    kept = {key: value for key, value in config.items() if key != "_name_or_path"}  # a path on the exporter's machine
    named = {"tokenizer_class": tokenizer} if strict and tokenizer else {}
    return (
        kept
        | named
        | {
            "architectures": [f"{prefix}{head}" for head in heads_of(config)],
            "auto_map": auto_map,
            "model_type": STRICT if strict else "qwen2",
        }
    )


def heads_of(config: Mapping[str, Any]) -> list[str]:
    """The ends of the checkpoint's architecture names. A checkpoint without any is a ForCausalLM."""
    heads = []
    for architecture in config.get("architectures") or ["Qwen2ForCausalLM"]:
        found = re.fullmatch(r"Qwen2(?:FP16)?(?:Strict)?(\w+)", str(architecture))
        if found is None or found[1] not in HEAD_WEIGHTS:
            raise ExportError(
                f"config.json has the architecture {quoted(architecture)}, which is not one of "
                f"{', '.join(HEAD_WEIGHTS)} of Qwen2: there is no fixed class for it."
            )
        heads.append(found[1])
    return heads


def heads_to_check(config: Mapping[str, Any]) -> list[str | None]:
    """The weight of each architecture's head, or None for a model without a head."""
    return [HEAD_WEIGHTS[head] for head in heads_of(config)]


def has_own_code(config: Mapping[str, Any]) -> bool:
    """Whether an exported config takes its code from its own folder."""
    return "--" not in str(config["auto_map"]["AutoModel"])


def check_foreign_code(config: Mapping[str, Any], name: str) -> None:
    """Raises ExportError if a configuration names code of others, which an export would lose."""
    auto_map = config.get("auto_map") or {}
    for auto, value in auto_map.items() if isinstance(auto_map, dict) else [("?", auto_map)]:
        if _module(value) not in (MODELS, CONFIGURATION):
            raise ExportError(
                f"{name} takes its {auto} from other code ({quoted(value)}), which an export would lose: remove that "
                "auto_map if the model is a plain Qwen2 without it."
            )


def _module(value: Any) -> str:
    """The module of `OWNER/NAME--module.Class` or `module.Class`. Other values give something that is not a module."""
    return str(value).rpartition("--")[2].partition(".")[0]
