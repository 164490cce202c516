"""The doctor's report as text: the verdict first, then what to do, then what it rests on."""

from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.syntax import Syntax
from rich.text import Text

from .remarks import in_words, remark


def render(report: dict[str, Any], console: Console, language: str = "en") -> None:
    """Prints a report of `doctor`; `language` is that of its sentences."""
    page = Page(console, language)
    page.line(report["verdict"], style="bold green" if report["healthy"] else "bold red", indent=0)
    page.remarks("findings", report["findings"][1:], "red")  # the first is in the verdict
    page.remarks("warnings", report["warnings"], "yellow")
    page.advice(report["advice"])
    page.heading("versions")
    known = {name: value for name, value in report["versions"].items() if isinstance(value, str | int)}
    page.line(", ".join(f"{name} {value}" for name, value in known.items() if name != "tested"))
    page.devices(report["devices"])
    page.heading("fix")
    page.line(report["fix"]["text"])
    page.heading("lock")
    page.line(report["lock"]["text"], *report["lock"]["differences"][1:])
    page.self_test(report["self_test"])
    if report["checkpoint"] is not None:
        page.checkpoint(report["checkpoint"])
    page.tools(report["tools"])
    page.settings(report["settings"])


class Page:
    """Prints the parts of a report, one below the other."""

    def __init__(self, console: Console, language: str) -> None:
        """console: styles come out where it is a terminal's."""
        self.console, self.language = console, language

    def say(self, code: str, **values: object) -> str:
        """A heading or a short phrase."""
        return in_words(remark(f"page.{code}", **values), self.language)

    def heading(self, code: str) -> None:
        """What the following lines are about."""
        self.console.print(Text("\n" + self.say(code), style="bold"))

    def line(self, *texts: str, style: str = "", indent: int = 2) -> None:
        """Each text indented, wrapped under itself, without blanks at the end of a line: they get pasted too."""
        for text in texts:
            for line in Text(text).wrap(self.console, self.console.width - indent):
                self.console.print(Text(" " * indent + line.plain.rstrip(), style=style))

    def remarks(self, code: str, remarks: list[dict[str, str]], style: str) -> None:
        """Findings or warnings."""
        if remarks:
            self.heading(code)
            self.line(*(f"- {item['text']}" for item in remarks), style=style)

    def advice(self, advice: list[dict[str, Any]]) -> None:
        """The recommendation, its reason, the code, and what to change for other needs."""
        if advice:
            self.heading("advice")
        for item in advice:
            self.line(f"{', '.join(item['devices'])}: {item['title']}", style="bold cyan")
            self.line(item["reason"])
            self.console.print()
            self._code(item["code"])
            self.console.print()
            self.line(*(f"{self.say('also')}: {other}" for other in item["also"]))

    def _code(self, code: str) -> None:
        """Lines of code, never wrapped: they are there to be copied."""
        if self.console.is_terminal:
            shown = Syntax(code, "python", background_color="default", theme="ansi_dark").highlight(code)
            self.console.print(
                *(Text("    ") + line for line in shown.split("\n") if line.plain), sep="\n", soft_wrap=True
            )
        else:
            for line in code.splitlines():
                self.console.print(Text(f"    {line}".rstrip()), soft_wrap=True)

    def devices(self, devices: list[dict[str, Any]]) -> None:
        """Each device and what it computes in."""
        self.heading("devices")
        for device in devices:
            known = [device["architecture"], device["level"], *device["flags"]]
            if device["capability"] is not None:
                known.append(self.say("capability", capability=device["capability"]))
            if device["memory"] is not None:
                known.append(f"{device['memory'] / 2**30:.0f} GiB")
            about = ", ".join([device["name"], *filter(None, known)])
            self.line(f"{device['place']}: {about}")
            native = {True: "native", False: "emulated", None: "unknown"}
            kinds = (f"{kind} {self.say(native[device[kind]])}" for kind in ("bfloat16", "float16"))
            self.line(", ".join(kinds), indent=4)

    def self_test(self, test: dict[str, Any]) -> None:
        """The outcome on each device, and why the limit is what it is."""
        self.heading("self_test")
        for result in test["results"]:
            mark = self.say("passed" if result["passed"] else "failed")
            self.line(f"{mark}: {result['text']}", style="green" if result["passed"] else "red")
        self.line(test["text"], style="dim")

    def checkpoint(self, facts: dict[str, Any]) -> None:
        """What the checkpoint is."""
        self.heading("checkpoint")
        self.line(self.say("shape", kind=facts["model_type"], layers=facts["layers"], hidden=facts["hidden"]))
        if "bytes" in facts:
            size, dtypes = decimal(facts["bytes"]), ", ".join(facts["stored"])
            self.line(self.say("size", parameters=facts["parameters"], size=size, dtypes=dtypes))
        self.line(*facts["notes"])

    def tools(self, tools: list[dict[str, Any]]) -> None:
        """Each tool and what it means."""
        self.heading("tools")
        for tool in tools:
            imported = f" ({self.say('imported')})" if tool["imported"] else ""
            self.line(f"{tool['name']} {tool['version'] or ''}".rstrip() + f"{imported}: {tool['text']}")
        if not tools:
            self.line(self.say("no_tools"))

    def settings(self, settings: list[dict[str, Any]]) -> None:
        """Each setting, its value, and whether it matters; those without effect here last."""
        self.heading("settings")
        for item in (item for item in settings if item["applies"]):
            self._setting(item, "yellow" if item["risky"] else "")
        without_effect = [item for item in settings if not item["applies"]]
        if without_effect:
            self.line(self.say("without_effect"), style="dim")
        for item in without_effect:
            self._setting(item, "dim")

    def _setting(self, item: dict[str, Any], style: str) -> None:
        value = self.say("absent") if item["value"] is None else str(item["value"])
        matters = in_words(remark(f"matters.{item['matters']}"), self.language)
        self.line(f"{item['name']} = {value} ({matters})", style=style)
        self.line(item["text"], style=style, indent=4)
