"""The doctor: what runs here, how a Qwen2 is best run on it, whether the fix works, and what is in the way.

`doctor` returns plain data in a language; `diagnosis_page` shows it. Nothing in the data says whose machine it is.
"""

import os
import platform
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from .. import locking
from ..model_status import status
from ..patches.errors import Qwen2FP16FixError, UnsupportedTransformersError
from ..patches.lock import VARIABLE
from ..patches.version_map import range_for
from ..translations import DOCTOR_TEXTS as TEXTS
from .advice import WAYS, Advice, advise, lines_of_code
from .checkpoint import TRAPS, config_of, examine
from .devices import Device, devices
from .numeric_settings import Setting, settings
from .other_tools import Tool, tools
from .redaction import private_places, redact
from .remarks import Remark, in_words, remark
from .self_test import KL_LIMIT, self_test


def doctor(path: str | Path | None = None, *, language: str = "en", progress: Console | None = None) -> dict[str, Any]:
    """Examines this environment and process and, with `path`, a checkpoint; a plain dict, fit for JSON.

    path: a checkpoint folder or a .safetensors file. language: of the sentences, "en" or "zh". progress: a rich Console
    to say on what is being tested.
    Keys: `healthy`, `supported`, `verdict` (a sentence), `findings` (what breaks) and `warnings` (what may), each a
    list of `code` and `text`; `versions`, `devices`, `advice`, `fix`, `lock`, `tools`, `settings`, `self_test`,
    `checkpoint` (None without a path). Paths, user names and tokens are left out.
    Raises CheckpointError for a `path` that holds no checkpoint.
    """
    place = None if path is None else Path(path).absolute()  # so that it can be found in every sentence
    if place is not None:
        config_of(place)  # before the self-test: a wrong path is said at once
    said = Remarks(language)
    found = status()
    unusable = why_unusable()
    supported = not isinstance(unusable, UnsupportedTransformersError)
    hardware = devices()
    advice = advise(hardware) if supported else []  # nothing to be built on
    report: dict[str, Any] = {
        "versions": versions_of(found),
        "devices": [facts_of(device) for device in hardware],
        "advice": [_advice(item, said, among_others=len(advice) > 1) for item in advice],
        "fix": said.fix(found, unusable),
        "lock": said.lock(place),
        "tools": [said.tool(tool) for tool in tools()],
        "settings": [said.setting(item, hardware) for item in settings()],
        "self_test": said.self_test(hardware if supported else [], progress),
        "checkpoint": None if place is None else said.checkpoint(place, progress),
    }
    said.about_devices(hardware, advice)
    verdict = said.verdict(report, supported)
    opening = {"healthy": supported and not said.findings, "supported": supported, "verdict": verdict}
    report = opening | {"findings": said.listed(said.findings), "warnings": said.listed(said.warnings)} | report
    redacted: dict[str, Any] = redact(report, private_places(place))
    return redacted


def exit_code(report: dict[str, Any]) -> int:
    """0 where all is well, 1 where something breaks, 3 where the installed transformers is not supported."""
    return 3 if not report["supported"] else int(not report["healthy"])


def why_unusable() -> Qwen2FP16FixError | None:
    """Why the fix cannot be used with the installed transformers, or None."""
    try:
        range_for(transformers.__version__)
        import_module("..registration.register", __package__)
    except Qwen2FP16FixError as error:
        return error
    return None


def versions_of(found: dict[str, Any]) -> dict[str, Any]:
    """Versions out of `status()`, and Python's and the system's."""
    names = ("package", "numerics", "transformers", "patch", "tested", "torch")
    system = f"{platform.system()} {platform.machine()}"
    return {"python": platform.python_version(), "system": system} | {
        name: found[name] for name in names if name in found
    }


def facts_of(device: Device) -> dict[str, Any]:
    """A device, fit for JSON."""
    return device._asdict() | {
        "capability": device.generation or None,
        "flags": sorted(device.flags),
        "bfloat16": device.bfloat16,
        "float16": device.float16,
    }


def lock_differences(path: Path | None) -> list[str] | None:
    """What differs from the locks in the current folder and the environment, and of an exported folder from its own.

    None without a lock.
    """
    own = path if path is not None and (path / locking.FILE_NAME).is_file() else None
    here = Path(locking.FILE_NAME).is_file() and (own is None or not own.samefile(Path.cwd()))
    named = os.environ.get(VARIABLE, "").strip()
    named = os.path.abspath(named) if named else ""  # so that it is found in a sentence
    locks = [lock for lock in (locking.FILE_NAME if here else "", named) if lock]
    if own is None and not locks:
        return None
    try:
        found = [] if own is None else locking.changed_files(own)
        return list(dict.fromkeys([*found, *(sentence for lock in locks for sentence in locking.check(lock))]))
    except Qwen2FP16FixError as error:
        return [str(error).replace(named, VARIABLE) if named else str(error)]


def _advice(item: Advice, said: "Remarks", among_others: bool) -> dict[str, Any]:
    return {
        "devices": [device.place for device in item.devices],
        "name": item.devices[0].name,
        "way": item.way,
        "needs_fix": WAYS[item.way].needs_fix,
        "title": said.words(remark(f"way.{item.way}")),
        "reason": said.words(item.reason),
        "code": lines_of_code(item.way, item.devices[0], transformers.__version__, among_others),
        "also": [said.words(other) for other in item.also],
    }


class Remarks:
    """Puts each part of the report into words, and collects what breaks and what may."""

    def __init__(self, language: str) -> None:
        """language: "en" or "zh"."""
        self.language = language
        self.findings: list[Remark] = []
        self.warnings: list[Remark] = []

    def words(self, what: Remark) -> str:
        """The remark in this report's language."""
        return in_words(what, self.language)

    def listed(self, remarks: Sequence[Remark]) -> list[dict[str, str]]:
        """Remarks as data."""
        return [{"code": what.code, "text": self.words(what)} for what in remarks]

    def fix(self, found: dict[str, Any], unusable: Qwen2FP16FixError | None) -> dict[str, Any]:
        """Whether the fix can be used, is on, and is registered in this process."""
        registered = bool(found["registered"]) and all(found["registered"].values())
        if unusable is not None:
            self.findings.append(remark("fix.unusable", problem=str(unusable)))
            text = self.words(self.findings[-1])
        elif not found["enabled"]:
            self.findings.append(remark("fix.off"))
            text = self.words(self.findings[-1])
        else:
            text = self.words(remark("fix.registered" if registered else "fix.not_registered"))
            if not found["tested"]:
                self.warnings.append(
                    remark("fix.untested", version=found["transformers"], supported=found["supported"])
                )
        known = {name: found[name] for name in ("supported", "enabled", "problem")}
        return known | {"registered": registered, "text": text}

    def lock(self, path: Path | None) -> dict[str, Any]:
        """Whether what runs here is pinned, and still what it was."""
        differences = lock_differences(path)
        if differences:
            self.findings.append(remark("lock.drifted", first=differences[0]))
        state = "none" if differences is None else "drifted" if differences else "kept"
        text = self.words(self.findings[-1] if differences else remark(f"lock.{state}"))
        return {"state": state, "differences": differences or [], "text": text}

    def tool(self, tool: Tool) -> dict[str, Any]:
        """What another tool means for the fix."""
        code = f"tool.{tool.name}"
        effect = remark(code if code in TEXTS[self.language] else "tool.other")
        if tool.replaced:
            effect = remark("tool.replaced", tool=tool.name, classes=", ".join(tool.replaced))
            self.findings.append(effect)
        return tool._asdict() | {"replaced": list(tool.replaced), "text": self.words(effect)}

    def setting(self, item: Setting, hardware: Sequence[Device]) -> dict[str, Any]:
        """What a setting means for a fixed model here."""
        effect = remark(f"setting.{item.name.rpartition('.')[2]}")
        if item.risky:
            self.warnings.append(effect)
        applies = ".cuda.matmul." not in item.name or any(device.kind in ("cuda", "rocm") for device in hardware)
        return item._asdict() | {"applies": applies, "text": self.words(effect)}

    def self_test(self, hardware: Sequence[Device], progress: Console | None) -> dict[str, Any]:
        """The self-test on every device."""
        results = []
        for device in hardware:
            if progress is not None:
                progress.print(self.words(remark("self_test.runs", device=device.place)), highlight=False)
            result, finding = self_test(device.place)
            if not result["passed"]:
                self.findings.append(finding)
            results.append(result | {"text": self.words(finding)})
        text = self.words(remark("self_test.why" if hardware else "self_test.skipped"))
        return {"limit": KL_LIMIT, "text": text, "results": results}

    def checkpoint(self, path: Path, progress: Console | None) -> dict[str, Any]:
        """What the checkpoint is and what to know about it."""
        facts, notes, problems = examine(path, progress)
        self.findings += problems
        self.warnings += [note for note in notes if note.code in TRAPS]
        return facts | {"notes": [self.words(note) for note in (*problems, *notes)]}

    def about_devices(self, hardware: Sequence[Device], advice: Sequence[Advice]) -> None:
        """Cards that this torch cannot use, and a model spread over cards that want different things."""
        for device in hardware:
            if not device.has_kernels:
                named = {"device": device.place, "name": device.name, "capability": device.generation}
                self.findings.insert(0, remark("device.no_kernels", **named))
        if len({item.way for item in advice}) > 1:
            self.warnings.append(remark("device.mixed"))

    def verdict(self, report: dict[str, Any], supported: bool) -> str:
        """The first thing to read."""
        if not supported:
            return self.words(remark("verdict.unsupported", problem=report["fix"]["problem"]))
        if self.findings:
            first, more = self.words(self.findings[0]), len(self.findings) - 1
            return self.words(remark("verdict.ill_more" if more else "verdict.ill", first=first, more=more))
        ways = [f"{item['title']} ({', '.join(item['devices'])})" for item in report["advice"]]
        return self.words(remark("verdict.well", ways="; ".join(ways)))
