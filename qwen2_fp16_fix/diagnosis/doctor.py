"""The doctor: the software and devices here, the best way to run a Qwen2 on them, and whether the fix works.

Its report has nothing that says whose machine this is.
"""

import os
import platform
from collections.abc import Sequence
from dataclasses import replace
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
from .checkpoint import CheckpointFacts, config_of, examine_checkpoint
from .devices import devices, examine_devices
from .environment import examine_settings, examine_tools
from .redaction import fill_in, private_places, redact
from .remarks import Remark, as_findings, in_words, remark
from .result import Diagnosis, FixState, LockState
from .self_test import examine_with_self_test

Examined = tuple[Any, list[Remark], list[Remark]]  # facts, findings and warnings


def doctor(
    path: str | Path | None = None, *, language: str = "en", redacted: bool = False, progress: Progress = None
) -> Diagnosis:
    """Examines this environment and process and, with `path`, a checkpoint.

    Args:
        path: A checkpoint folder, a .safetensors file, or OWNER/NAME or OWNER/NAME@REVISION on the Hub.
        language: Language of the sentences: "en" or "zh".
        redacted: True to write PATH in place of `path`, which lines of code and commands name otherwise. Nothing else
            in a report is private.
        progress: True to name on stderr what is being tested, or a rich Console to name it on.

    Returns:
        A Diagnosis. `healthy` and `verdict` give the outcome, `findings` what breaks, `warnings` what may break,
        `advice` how to run a Qwen2 on each device. `to_dict()` has the same as plain data.

    Raises:
        CheckpointError: There is no checkpoint at `path`.
        HubError: The Hub cannot be reached, or does not give the checkpoint.
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
        "checkpoint": examine_checkpoint(place, language, console, supported),
    }
    parts["advice"] = recommend(usable, language, transformers.__version__, parts["checkpoint"][0])
    facts = {name: part[0] for name, part in parts.items()}
    findings = [finding for part in parts.values() for finding in part[1]]
    warnings = [warning for part in parts.values() for warning in part[2]]
    problem = None if supported else str(found.problem)
    report = Diagnosis(
        healthy=supported and not findings,
        supported=supported,
        verdict=verdict(problem, findings, facts["checkpoint"], facts["advice"], language),
        findings=as_findings(findings, language),
        warnings=as_findings(warnings, language),
        versions=versions_of(found),
        language=language,
        **facts,
    )
    found_private: Diagnosis = redact(report, private_places(place))
    if path is None or redacted:
        return found_private
    named: Diagnosis = fill_in(replace(found_private, names_path=True), path)
    return named


def verdict(
    problem: str | None,
    findings: Sequence[Remark],
    checkpoint: CheckpointFacts | None,
    advice: Sequence[Recommendation],
    language: str,
) -> str:
    """The first sentence of the report. problem: why transformers is not supported, or None."""
    if problem is not None:
        return in_words(remark("verdict.unsupported", problem=problem), language)
    if findings:
        first, more = in_words(findings[0], language), len(findings) - 1
        return in_words(remark("verdict.ill_more" if more else "verdict.ill", first=first, more=more), language)
    ways = "; ".join(f"{item.title} ({', '.join(item.devices)})" for item in advice)
    if checkpoint is not None and checkpoint.quantised is not None:
        return in_words(remark("verdict.quantised", ways=ways), language)
    if checkpoint is None or checkpoint.stock is None:
        return in_words(remark("verdict.well", ways=ways), language)
    return in_words(remark("verdict.checkpoint", answer=checkpoint.stock.text[0], ways=ways), language)


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
