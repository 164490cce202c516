"""The doctor: the software and devices here, the best way to run a Qwen2 on them, and whether the fix works.

Its report has nothing that says whose machine this is.
"""

import os
import platform
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers

from .. import locking
from ..checkpoints.hub_ids import find_checkpoint
from ..model_status import status
from ..patches.errors import Qwen2FP16FixError, UnsupportedTransformersError
from ..patches.lock import VARIABLE
from ..patches.version_map import range_for
from ..progress import Progress, console_of
from ..status_result import Status
from .advice import Recommendation, recommend
from .checkpoint import config_of, examine_checkpoint
from .devices import devices, examine_devices
from .environment import examine_settings, examine_tools
from .redaction import private_places, redact
from .remarks import Remark, as_findings, in_words, remark
from .result import Diagnosis, FixState, LockState
from .self_test import examine_with_self_test

Examined = tuple[Any, list[Remark], list[Remark]]  # facts, findings and warnings


def doctor(path: str | Path | None = None, *, language: str = "en", progress: Progress = None) -> Diagnosis:
    """Examines this environment and process and, with `path`, a checkpoint.

    path: a checkpoint folder, a .safetensors file, or OWNER/NAME or OWNER/NAME@REVISION on the Hub. language: of the
    sentences, "en" or "zh". progress: True to say on stderr what is being tested, or a rich Console to say it on.
    Returns a Diagnosis: `healthy` and `verdict` (a sentence) say how it ended, `findings` what breaks, `warnings` what
    may break, `advice` how to run a Qwen2 on each device. `to_dict()` is the same as plain data.
    Raises CheckpointError if `path` holds no checkpoint, HubError if the Hub does not give it.
    """
    # absolute, so that the redaction finds it in every sentence
    place = None if path is None else find_checkpoint(path).absolute()
    if place is not None:
        config_of(place)  # before the self-test: a wrong path is said at once
    console = console_of(progress)
    found = status()
    unusable = why_unusable()
    supported = not isinstance(unusable, UnsupportedTransformersError)
    hardware = devices()
    usable = hardware if supported else []  # without a supported transformers there is nothing to advise or to test
    parts: dict[str, Examined] = {
        "devices": examine_devices(hardware),
        "fix": examine_fix(found, unusable, language),
        "lock": examine_lock(place, language),
        "tools": examine_tools(language),
        "settings": examine_settings(hardware, language),
        "self_test": examine_with_self_test(usable, language, console),
        "checkpoint": examine_checkpoint(place, language, console),
        "advice": recommend(usable, language, transformers.__version__),
    }
    facts = {name: part[0] for name, part in parts.items()}
    findings = [finding for part in parts.values() for finding in part[1]]
    warnings = [warning for part in parts.values() for warning in part[2]]
    problem = None if supported else str(found.problem)
    report = Diagnosis(
        healthy=supported and not findings,
        supported=supported,
        verdict=verdict(problem, as_texts(findings, language), facts["advice"], language),
        findings=as_findings(findings, language),
        warnings=as_findings(warnings, language),
        versions=versions_of(found),
        language=language,
        **facts,
    )
    redacted: Diagnosis = redact(report, private_places(place))
    return redacted


def as_texts(remarks: Sequence[Remark], language: str) -> list[str]:
    """The sentences in a language."""
    return [in_words(what, language) for what in remarks]


def verdict(problem: str | None, findings: Sequence[str], advice: Sequence[Recommendation], language: str) -> str:
    """The first sentence of the report. problem: why transformers is not supported, or None."""
    if problem is not None:
        return in_words(remark("verdict.unsupported", problem=problem), language)
    if findings:
        more = len(findings) - 1
        code = "verdict.ill_more" if more else "verdict.ill"
        return in_words(remark(code, first=findings[0], more=more), language)
    ways = [f"{item.title} ({', '.join(item.devices)})" for item in advice]
    return in_words(remark("verdict.well", ways="; ".join(ways)), language)


def why_unusable() -> Qwen2FP16FixError | None:
    """Why the fix cannot be used with the installed transformers, or None."""
    try:
        range_for(transformers.__version__)
        import_module("..registration.register", __package__)
    except Qwen2FP16FixError as error:
        return error
    return None


def versions_of(found: Status) -> dict[str, Any]:
    """Versions from `status()`, and those of Python and the system."""
    names = ("package", "numerics", "transformers", "patch", "tested", "torch")
    system = f"{platform.system()} {platform.machine()}"
    return {"python": platform.python_version(), "system": system} | {name: getattr(found, name) for name in names}


def examine_fix(found: Status, unusable: Qwen2FP16FixError | None, language: str) -> Examined:
    """Whether the fix can be used, is on, and is registered in this process."""
    registered = bool(found.registered) and all(found.registered.values())
    findings, warnings = [], []
    said = remark("fix.registered" if registered else "fix.not_registered")
    if unusable is not None:
        said = remark("fix.unusable", problem=str(unusable))
        findings.append(said)
    elif not found.enabled:
        said = remark("fix.off")
        findings.append(said)
    elif not found.tested:
        warnings.append(remark("fix.untested", version=found.transformers, supported=found.supported))
    text = in_words(said, language)
    return FixState(found.supported, found.enabled, found.problem, registered, text), findings, warnings


def examine_lock(path: Path | None, language: str) -> Examined:
    """Whether a lock pins this installation, and whether it is still the same."""
    differences = lock_differences(path)
    if differences:
        said = remark("lock.drifted", first=differences[0])
        return LockState("drifted", differences, in_words(said, language)), [said], []
    state = "none" if differences is None else "kept"
    return LockState(state, [], in_words(remark(f"lock.{state}"), language)), [], []


def lock_differences(path: Path | None) -> list[str] | None:
    """Differences from the locks in the current folder and the environment, and of an exported folder from its own.

    None without a lock.
    """
    own = path if path is not None and (path / locking.FILE_NAME).is_file() else None
    here = Path(locking.FILE_NAME).is_file() and (own is None or not own.samefile(Path.cwd()))
    named = os.environ.get(VARIABLE, "").strip()
    named = os.path.abspath(named) if named else ""  # so that the redaction finds it in a sentence
    locks = [lock for lock in (locking.FILE_NAME if here else "", named) if lock]
    if own is None and not locks:
        return None
    try:
        found = [] if own is None else locking.changed_files(own)
        return list(dict.fromkeys([*found, *(each for lock in locks for each in locking.find_differences(lock))]))
    except Qwen2FP16FixError as error:
        return [str(error).replace(named, VARIABLE) if named else str(error)]
