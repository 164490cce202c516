"""The doctor's report as text for a terminal."""

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderableType
from rich.filesize import decimal
from rich.syntax import Syntax
from rich.text import Text

from .advice import Recommendation
from .checkpoint import CheckpointFacts
from .devices import DeviceFacts
from .environment import SettingFacts, ToolFacts
from .remarks import Finding, in_words, remark
from .self_test import SelfTests


class Lines:
    """Texts below each other, indented and wrapped, without blanks at the end of a line: they get pasted too."""

    def __init__(self, *texts: str, style: str = "", indent: int = 2) -> None:
        """style: of every line. indent: blanks before every line."""
        self.texts, self.style, self.indent = texts, style, indent

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The lines."""
        for text in self.texts:
            for line in Text(text).wrap(console, options.max_width - self.indent):
                yield Text(" " * self.indent + line.plain.rstrip(), style=self.style)


class Code:
    """Lines of Python to be copied, in colour on a terminal. Print them with `soft_wrap=True`, which wraps none."""

    def __init__(self, code: str) -> None:
        """code: the lines."""
        self.code = code

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The lines, indented."""
        if options.is_terminal:
            shown = Syntax(self.code, "python", background_color="default", theme="ansi_dark").highlight(self.code)
            yield from (Text("    ") + line for line in shown.split("\n") if line.plain)
        else:
            yield from (Text(f"    {line}".rstrip()) for line in self.code.splitlines())


class ReportParts:
    """The parts of a report. Each is a list of renderables, which are printed below each other."""

    def __init__(self, language: str) -> None:
        """language: of the headings and phrases."""
        self.language = language

    def say(self, code: str, **values: object) -> str:
        """A heading or a short phrase."""
        return in_words(remark(f"page.{code}", **values), self.language)

    def heading(self, code: str) -> Text:
        """The title of the following lines."""
        return Text("\n" + self.say(code), style="bold")

    def findings(self, code: str, findings: Sequence[Finding], style: str) -> list[RenderableType]:
        """Findings or warnings, if there are any."""
        if not findings:
            return []
        return [self.heading(code), Lines(*(f"- {item.text}" for item in findings), style=style)]

    def advice(self, advice: Iterable[Recommendation]) -> list[RenderableType]:
        """The recommendation, its reason, the code, and changes for other needs."""
        found: list[RenderableType] = []
        for item in advice:
            title = Lines(f"{', '.join(item.devices)}: {item.title}", style="bold cyan")
            also = Lines(*(f"{self.say('also')}: {other}" for other in item.also))
            found += [title, Lines(item.reason), Text(), Code(item.code), Text(), also]
        return [self.heading("advice"), *found] if found else []

    def about(self, facts: CheckpointFacts, elsewhere: Sequence[str]) -> list[RenderableType]:
        """What was seen of a checkpoint, below the verdict: the rest of the answer, and the notes.

        elsewhere: notes that are on the page already.
        """
        answer = [] if facts.stock is None else facts.stock.text[1:]
        return [Lines(*answer, *(note for note in facts.notes if note not in elsewhere), indent=0)]

    def passed(self, test: SelfTests) -> list[str]:
        """The outcome of the self-test in a line. A test that failed is a finding."""
        passed = [result.device for result in test.results if result.passed]
        return [self.say("self_test_passed", devices=", ".join(passed))] if passed else []

    def devices(self, devices: Iterable[DeviceFacts]) -> list[RenderableType]:
        """Each device and the types it computes in."""
        native = {True: "native", False: "emulated", None: "unknown"}
        found: list[RenderableType] = [self.heading("devices")]
        for device in devices:
            known = [device.architecture, device.level, *device.flags]
            if device.capability is not None:
                known.append(self.say("capability", capability=device.capability))
            if device.memory is not None:
                known.append(f"{device.memory / 2**30:.0f} GiB")
            found.append(Lines(f"{device.place}: {', '.join([device.name, *filter(None, known)])}"))
            kinds = (("bfloat16", device.bfloat16), ("float16", device.float16))
            found.append(Lines(", ".join(f"{kind} {self.say(native[has])}" for kind, has in kinds), indent=4))
        return found

    def self_test(self, test: SelfTests) -> list[RenderableType]:
        """The outcome on each device, and the reason for the limit."""
        found: list[RenderableType] = [self.heading("self_test")]
        for result in test.results:
            mark = self.say("passed" if result.passed else "failed")
            found.append(Lines(f"{mark}: {result.text}", style="green" if result.passed else "red"))
        return [*found, Lines(test.text, style="dim")]

    def checkpoint(self, facts: CheckpointFacts) -> list[RenderableType]:
        """The facts of the checkpoint."""
        shape = self.say("shape", kind=facts.model_type, layers=facts.layers, hidden=facts.hidden)
        found: list[RenderableType] = [self.heading("checkpoint"), Lines(shape)]
        if facts.bytes is not None:
            size, dtypes = decimal(facts.bytes), ", ".join(facts.stored or ())
            found.append(Lines(self.say("size", parameters=facts.parameters, size=size, dtypes=dtypes)))
        return found

    def tools(self, tools: Sequence[ToolFacts]) -> list[RenderableType]:
        """Each tool and its effect."""
        found: list[RenderableType] = [self.heading("tools")]
        for tool in tools:
            imported = f" ({self.say('imported')})" if tool.imported else ""
            found.append(Lines(f"{tool.name} {tool.version or ''}".rstrip() + f"{imported}: {tool.text}"))
        return found if tools else [*found, Lines(self.say("no_tools"))]

    def settings(self, settings: Sequence[SettingFacts]) -> list[RenderableType]:
        """Each setting of the devices here, its value, and whether it matters."""
        found: list[RenderableType] = [self.heading("settings")]
        for item in (item for item in settings if item.applies):
            found += self._setting(item, "yellow" if item.risky else "")
        return found

    def _setting(self, item: SettingFacts, style: str) -> list[RenderableType]:
        value = self.say("absent") if item.value is None else str(item.value)
        matters = in_words(remark(f"matters.{item.matters}"), self.language)
        return [Lines(f"{item.name} = {value} ({matters})", style=style), Lines(item.text, style=style, indent=4)]
