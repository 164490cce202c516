"""Facts of a checkpoint: from its config.json, the headers of its shards, a quick proof and a short run."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..checkpoints.config import (
    MODEL_TYPES,
    check_architectures,
    code_named,
    foreign_code,
    generates,
    is_exported,
    read_config,
    read_json,
)
from ..checkpoints.folder import LM_HEAD, FolderSource
from ..checkpoints.stored import has_pickles
from ..checkpoints.threads import usable_cores
from ..errors import CheckpointError
from ..patches.errors import Qwen2FP16FixError
from ..results import Record
from .answer import StockAnswer, answer_for
from .remarks import Remark, in_words, remark

QUICK = 2**30  # bytes of weights, which `certify` bounds in some five seconds on one core
BYTES_A_SECOND = 2.4e8  # of weights that `certify` bounds on one core
#: Notes that are warnings as well.
WARNING_CODES = ("checkpoint.stock_name", "checkpoint.no_auto_model", "checkpoint.not_proven")
QUANTISATIONS = ("gptq", "awq", "bitsandbytes")  # each has a sentence of its own


@dataclass(frozen=True)
class CheckpointFacts(Record):
    """The facts of a checkpoint: its type, its code, its sizes, and notes."""

    model_type: str
    architectures: list[str]
    auto_map: dict[str, str]  # Auto class to module and class, without the repository
    exported: bool  # it carries the fix as remote code
    quantised: str | None  # the method
    layers: int | None
    hidden: int | None
    notes: list[str]  # what is wrong with it, and what else to know
    wrapped: bool = False  # it is another model with a Qwen2 inside
    bytes: int | None = None  # this and the next two only if the weights could be read
    parameters: int | None = None
    stored: dict[str, int] | None = None  # parameters by dtype
    proven: bool | None = None  # by `certify`, only if that was quick
    stock: StockAnswer | None = None  # only if its weights are plain floating-point numbers

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, without what is not known, and with the notes last."""
        found = super().to_dict()
        notes = found.pop("notes")
        unknown = [name for name in ("bytes", "parameters", "stored", "proven", "stock") if found[name] is None]
        return {name: value for name, value in found.items() if name not in unknown} | {"notes": notes}


def examine_checkpoint(
    path: Path | None, language: str, progress: Console | None, supported: bool
) -> tuple[CheckpointFacts | None, list[Remark], list[Remark]]:
    """The facts, problems as findings, and some of the notes as warnings. Nothing without a path.

    supported: whether the installed transformers is. Without, no model is run.
    """
    if path is None:
        return None, [], []
    facts, notes, problems = examine(path, progress if supported else None, language if supported else None)
    found = CheckpointFacts(**facts, notes=[in_words(each, language) for each in (*problems, *notes)])
    return found, problems, [note for note in notes if note.code in WARNING_CODES]


def config_of(path: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder, or of the folder that holds the file `path`. Any model's.

    Raises CheckpointError if it cannot be read. Its sentence does not contain the path.
    """
    try:
        found, folder = path.exists(), path if path.is_dir() else path.parent
    except OSError as error:
        raise CheckpointError(f"the checkpoint cannot be read ({error.strerror}): change its permissions.") from None
    if not found:
        raise CheckpointError("there is no such checkpoint: give a folder, or a .safetensors file.")
    if not (folder / "config.json").is_file():
        try:
            return read_config(folder)  # says what the folder is instead
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(folder), "the folder")) from None
    config = read_json(folder / "config.json")
    check_architectures(config)
    return config


def examine(
    path: Path, progress: Console | None = None, language: str | None = "en"
) -> tuple[dict[str, Any], list[Remark], list[Remark]]:
    """The fields of CheckpointFacts, notes, and problems that make the checkpoint unusable.

    language: of the answer; None for no answer, so that no weight is read.
    Raises CheckpointError if there is no checkpoint at all.
    """
    config = config_of(path)
    facts: dict[str, Any] = {
        "model_type": str(config.get("model_type")),
        "architectures": [str(name) for name in config.get("architectures") or ()],
        "auto_map": code_named(config),
        "exported": is_exported(config),
        "quantised": quantisation_method(config),
        "layers": config.get("num_hidden_layers"),
        "hidden": config.get("hidden_size"),
    }
    if facts["model_type"] not in MODEL_TYPES:
        if any(isinstance(part, dict) and part.get("model_type") == "qwen2" for part in config.values()):
            return facts | {"wrapped": True}, [remark("checkpoint.wrapped", kind=facts["model_type"])], []
        return facts, [], [remark("checkpoint.not_qwen2", kind=facts["model_type"])]
    notes = [*code_warnings(facts), *_quantised(facts["quantised"])]
    foreign = foreign_code(config)
    problems = [] if foreign is None else [remark("checkpoint.foreign_code", module=foreign.partition(".")[0])]
    if _only_pickles(path):
        return facts, [*notes, remark("checkpoint.bin")], problems
    try:
        source = FolderSource(path)
        source.check_complete(LM_HEAD if generates(config, unnamed=True) else None)
        facts |= sizes(source)
        if language is not None:
            notes += _proof_and_run(path, facts, progress, language)
        if "stock" in facts and not facts["stock"].weights_fit:
            problems.append(remark("checkpoint.infinite_weights"))
    except Qwen2FP16FixError as error:
        return facts, notes, [*problems, remark("checkpoint.broken", problem=str(error))]
    return facts, notes, problems


def quantisation_method(config: dict[str, Any]) -> str | None:
    """The method of a quantised checkpoint; None for one that is not."""
    found = config.get("quantization_config")
    if not found:
        return None
    return str(found.get("quant_method") or "unnamed") if isinstance(found, dict) else "unnamed"


def code_warnings(facts: dict[str, Any]) -> list[Remark]:
    """Why a loader or an engine may build a model without the fix: the checkpoint's code and its class names."""
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
    """Bytes, parameters, and parameters by stored dtype, from the headers of the shards."""
    stored = Counter[str]()
    for found in source.stored.values():
        stored[found.dtype] += math.prod(found.shape)
    size = sum(file.stat().st_size for file in source.files)
    return {"bytes": size, "parameters": stored.total(), "stored": dict(stored.most_common())}


def _proof_and_run(path: Path, facts: dict[str, Any], progress: Console | None, language: str) -> list[Remark]:
    """Adds to the facts what a short run finds, and `certify` if it is quick. Returns a note on the proof."""
    if facts["quantised"]:
        return [remark("checkpoint.never_proven")]
    found = None
    if facts["bytes"] > QUICK:
        seconds = f"{facts['bytes'] / BYTES_A_SECOND / usable_cores():.0f}"
        said = remark("checkpoint.certify", command="qwen2-fp16-fix certify PATH", seconds=seconds)
    else:
        from ..certification.certify import certify

        found = certify(path, progress)
        facts["proven"] = found.proven
        said = remark(
            "checkpoint.proven" if found.proven else "checkpoint.not_proven", reason=next(iter(found.reasons), "")
        )
    if path.is_dir() and generates(config_of(path), unnamed=True):
        facts["stock"] = answer_for(path, found, language, progress)
    return [said]


def _quantised(method: str | None) -> list[Remark]:
    if method is None:
        return []
    known = next((name for name in QUANTISATIONS if method.startswith(name)), "other")
    return [remark(f"quantised.{known}", method=method)]


def _only_pickles(path: Path) -> bool:
    return path.is_dir() and not any(path.glob("*.safetensors*")) and has_pickles(path)
