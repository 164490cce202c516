"""What a checkpoint is, from its config.json and the headers of its shards; weights are read for a quick proof only."""

from collections import Counter
from pathlib import Path
from typing import Any

import safetensors
from rich.console import Console

from ..checkpoints.config import (
    MODEL_TYPES,
    check_architectures,
    code_named,
    foreign_code,
    generates,
    is_exported,
    read_json,
)
from ..checkpoints.folder import LM_HEAD, FolderSource
from ..doctor_texts import Remark, remark
from ..errors import CheckpointError
from ..patches.errors import Qwen2FP16FixError

QUICK = 2**26  # bytes of weights that are bounded in about a second
BYTES_A_SECOND = 5e8  # bounded on two cores: 15 GB in half a minute
TRAPS = ("checkpoint.stock_name", "checkpoint.no_auto_model", "checkpoint.not_proven")  # notes that are warnings
QUANTISATIONS = ("gptq", "awq", "bitsandbytes")  # with a sentence of their own


def config_of(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, or of the folder a file is in, whatever model it is of.

    Raises CheckpointError, without the path in its sentence, where there is none to read.
    """
    try:
        found, folder = path.exists(), path if path.is_dir() else path.parent
    except OSError as error:
        raise CheckpointError(f"the checkpoint cannot be read ({error.strerror}): change its rights.") from None
    if not found:
        raise CheckpointError("there is no such checkpoint: give a folder, or a .safetensors file.")
    config = read_json(folder / "config.json")
    check_architectures(config)
    return config


def examine(path: Path, progress: Console | None = None) -> tuple[dict[str, Any], list[Remark], list[Remark]]:
    """What the checkpoint is, fit for JSON; what is worth knowing about it; and what makes it unusable.

    Raises CheckpointError for what is no checkpoint at all.
    """
    config = config_of(path)
    facts: dict[str, Any] = {
        "model_type": str(config.get("model_type")),
        "architectures": [str(name) for name in config.get("architectures") or ()],
        "auto_map": code_named(config),
        "exported": is_exported(config),
        "quantised": quantisation(config),
        "layers": config.get("num_hidden_layers"),
        "hidden": config.get("hidden_size"),
    }
    if facts["model_type"] not in MODEL_TYPES:
        if any(isinstance(part, dict) and part.get("model_type") == "qwen2" for part in config.values()):
            return facts, [remark("checkpoint.wrapped", kind=facts["model_type"])], []
        return facts, [], [remark("checkpoint.not_qwen2", kind=facts["model_type"])]
    notes = [*traps(facts), *_quantised(facts["quantised"])]
    foreign = foreign_code(config)
    problems = [] if foreign is None else [remark("checkpoint.foreign_code", module=foreign.partition(".")[0])]
    if _only_pickles(path):
        return facts, [*notes, remark("checkpoint.bin")], problems
    try:
        source = FolderSource(path)
        source.check_complete(LM_HEAD if generates(config, unnamed=True) else None)
        facts |= sizes(source)
        notes.append(_certificate(path, facts, progress))
    except Qwen2FP16FixError as error:
        return facts, notes, [*problems, remark("checkpoint.broken", problem=str(error))]
    return facts, notes, problems


def quantisation(config: dict[str, Any]) -> str | None:
    """The method of a quantised checkpoint; None for one that is not."""
    found = config.get("quantization_config")
    if not found:
        return None
    return str(found.get("quant_method") or "unnamed") if isinstance(found, dict) else "unnamed"


def traps(facts: dict[str, Any]) -> list[Remark]:
    """Ways in which this checkpoint's code or names lead a loader or an engine to a model without the fix."""
    code, stock = facts["auto_map"], "Qwen2ForCausalLM" in facts["architectures"]
    found = []
    if facts["exported"]:
        found.append(remark("checkpoint.exported"))
    if code and stock:
        found.append(remark("checkpoint.stock_name"))
    if code and "AutoModel" not in code:
        found.append(remark("checkpoint.no_auto_model"))
    return found


def sizes(source: FolderSource) -> dict[str, Any]:
    """Bytes, parameters and bytes by stored dtype, from the headers of the shards."""
    stored, parameters = Counter[str](), 0
    for file in sorted(set(source.files.values())):
        try:
            with safetensors.safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118, an opened file is no mapping
                    header = tensors.get_slice(name)
                    count = 1
                    for length in header.get_shape():
                        count *= length
                    parameters += count
                    stored[header.get_dtype()] += count
        except (OSError, safetensors.SafetensorError):
            raise CheckpointError(f"{file.name} cannot be read: it is missing, damaged or half written.") from None
    size = sum(file.stat().st_size for file in set(source.files.values()))
    return {"bytes": size, "parameters": parameters, "stored": dict(stored.most_common())}


def _certificate(path: Path, facts: dict[str, Any], progress: Console | None) -> Remark:
    """The verdict of `certify` where that is quick, or the command."""
    if facts["quantised"]:
        return remark("checkpoint.never_proven")
    if facts["bytes"] > QUICK:
        seconds = f"{facts['bytes'] / BYTES_A_SECOND:.0f}"
        return remark("checkpoint.certify", command="qwen2-fp16-fix certify PATH", seconds=seconds)
    from ..certificate import certify

    found = certify(path, progress)
    facts["proven"] = found["proven"]
    if found["proven"]:
        return remark("checkpoint.proven", layers=len(found["layers"]), scaled=found["scaled_layers"])
    return remark("checkpoint.not_proven", reason=found["reasons"][0])


def _quantised(method: str | None) -> list[Remark]:
    if method is None:
        return []
    known = next((name for name in QUANTISATIONS if method.startswith(name)), "other")
    return [remark(f"quantised.{known}", method=method)]


def _only_pickles(path: Path) -> bool:
    return path.is_dir() and not any(path.glob("*.safetensors*")) and any(path.glob("*.bin"))
