"""Options that several commands share, and the choices that an option has."""

from enum import Enum
from pathlib import Path
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


#: A flag: typer would write `<bool>` behind its name.
FLAG = ""

PathOrId = Annotated[
    str,
    typer.Argument(
        metavar="PATH_OR_ID",
        help="A checkpoint folder, or a model on the Hub: OWNER/NAME or OWNER/NAME@REVISION.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", metavar=FLAG, help="Print JSON.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the result to a file, as JSON.")
]
Force = Annotated[bool, typer.Option("--force", metavar=FLAG, help="Overwrite files that exist.")]
Details = Annotated[bool, typer.Option("--details", metavar=FLAG, help="Print what the summary leaves out, too.")]
Lang = Annotated[Language, typer.Option("--lang", metavar="en|zh", help="Language of the text.")]
DeviceOption = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="cpu or cuda. Default: cuda where there is one.")
]
