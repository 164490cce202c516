"""The result of `doctor`."""

from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType

from ..results import Record, Result
from . import text
from .advice import Recommendation
from .checkpoint import CheckpointFacts
from .devices import DeviceFacts
from .environment import SettingFacts, ToolFacts
from .remarks import Finding
from .self_test import SelfTests

#: Findings about a checkpoint for which every other command ends with 2.
REFUSED = ("checkpoint.broken", "checkpoint.not_qwen2", "checkpoint.bin")


@dataclass(frozen=True)
class FixState(Record):
    """Whether the fix can be used, is on, and is registered in this process."""

    supported: str  # the releases of transformers, as a requirement
    enabled: bool  # False under QWEN2_FP16_FIX=0
    problem: str | None  # why it cannot be used
    registered: bool
    text: str


@dataclass(frozen=True)
class LockState(Record):
    """Whether a lock pins this installation, and whether it is still the same."""

    state: str  # "none", "kept" or "drifted"
    differences: list[str]
    text: str


@dataclass(frozen=True, repr=False)
class Diagnosis(Result):
    """The result of `doctor`. Paths, user names and tokens are left out."""

    healthy: bool
    supported: bool  # the installed transformers
    verdict: str
    findings: list[Finding]  # what breaks
    warnings: list[Finding]  # what may break
    versions: dict[str, Any]
    devices: list[DeviceFacts]
    advice: list[Recommendation]
    fix: FixState
    lock: LockState
    tools: list[ToolFacts]
    settings: list[SettingFacts]
    self_test: SelfTests
    checkpoint: CheckpointFacts | None  # None without a path
    language: str = "en"  # of the sentences; this and the next are not in `to_dict`
    names_path: bool = False  # in lines of code and commands

    @property
    def exit_code(self) -> int:
        """0 if all is well, 1 if something is wrong here, 2 for a checkpoint that every other command refuses with 2.

        3 if the installed transformers is not supported.
        """
        if not self.supported:
            return 3
        return 2 if any(item.code in REFUSED for item in self.findings) else int(not self.healthy)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data: what `doctor --json` prints."""
        found = super().to_dict()
        del found["language"], found["names_path"]
        return found

    def summary(self) -> str:
        """The verdict."""
        return self.verdict

    def __rich__(self) -> RenderableType:
        """The answer, what to do, and what was checked. Print it with `soft_wrap=True`, so that no code is wrapped."""
        page = text.ReportParts(self.language)
        checked = [self._versions(), *page.passed(self.self_test), page.say("fix_is", text=self.fix.text)]
        checked += [self.lock.text, *self.lock.differences[1:]] if self.lock.state != "none" else []
        if self.tools:
            names = (f"{tool.name} {tool.version or ''}".rstrip() for tool in self.tools)
            checked.append(page.say("tools_here", tools=", ".join(names)))
        return Group(*self._answer(page), page.heading("checked"), text.Lines(*checked, *self._last(page)))

    def details(self) -> RenderableType:
        """The same with every device, tool and setting, for rich: what `doctor --details` prints."""
        page = text.ReportParts(self.language)
        parts: list[list[RenderableType]] = [
            self._answer(page),
            [page.heading("versions"), text.Lines(self._versions())],
            page.devices(self.devices),
            [page.heading("fix"), text.Lines(self.fix.text)],
            [page.heading("lock"), text.Lines(self.lock.text, *self.lock.differences[1:])],
            page.self_test(self.self_test),
            [] if self.checkpoint is None else page.checkpoint(self.checkpoint),
            page.tools(self.tools),
            page.settings(self.settings),
            [text.Lines(page.say("names_path"))] if self.names_path else [],
        ]
        return Group(*(each for part in parts for each in part))

    def _last(self, page: text.ReportParts) -> list[str]:
        return [page.say("more"), *([page.say("names_path")] if self.names_path else [])]

    def _answer(self, page: text.ReportParts) -> list[RenderableType]:
        """The verdict, what the checkpoint shows, what is wrong, and what to do."""
        elsewhere = [item.text for item in (*self.findings, *self.warnings)]
        shown = [] if self.checkpoint is None else page.about(self.checkpoint, elsewhere)
        return [
            text.Lines(self.verdict, style="bold green" if self.healthy else "bold red", indent=0),
            *shown,
            *page.findings("findings", self.findings[1:], "red"),  # the first is in the verdict
            *page.findings("warnings", self.warnings, "yellow"),
            *page.advice(self.advice),
        ]

    def _versions(self) -> str:
        known = {name: value for name, value in self.versions.items() if isinstance(value, str | int)}
        return ", ".join(f"{name} {value}" for name, value in known.items() if name != "tested")
