"""Options that several commands share, and the choices that an option has."""

from enum import Enum
from typing import Annotated

import typer


class Language(str, Enum):
    """A language that a report can be in."""

    ENGLISH = "en"
    CHINESE = "zh"


class AttentionChoice(str, Enum):
    """The attention implementation of a scan."""

    eager = "eager"
    sdpa = "sdpa"


class WeightsChoice(str, Enum):
    """How the weights get into an export."""

    link = "link"
    copy = "copy"


AsJson = Annotated[bool, typer.Option("--json", help="Print the data as JSON.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")]
