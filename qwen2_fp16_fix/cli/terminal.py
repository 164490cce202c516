"""Printing to a stdout that may be a closed pipe or a full disk, or whose encoding may lack our characters."""

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rich.console import Console, RenderableType

CLOSED = 128 + 13  # the exit code that a shell gives a program ended by SIGPIPE


class PrintError(Exception):
    """The result cannot be printed."""

    exit_code = 2


class Page(Console):
    """Stdout without rich's markup, so that a token `[/INST]` is printed as it stands."""

    def __init__(self) -> None:
        """As wide as the terminal."""
        super().__init__(markup=False)

    def on_broken_pipe(self) -> None:
        """Leaves it to `printing`. rich would end the program with 1, which means a finding here."""
        raise BrokenPipeError


class Notices(Console):
    """Stderr. If nobody reads it any more, the run continues without it."""

    def __init__(self, soft_wrap: bool = False) -> None:
        """soft_wrap: lines are not wrapped, so that programs can search them."""
        super().__init__(stderr=True, highlight=False, soft_wrap=soft_wrap)

    def on_broken_pipe(self) -> None:
        """Prints no more: a run of minutes must not be lost for a line of progress."""
        self.quiet = True


def replace_unknown_signs() -> None:
    """Makes stdout print `?` for a character that its encoding lacks, instead of failing after the run."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def printing() -> Iterator[Console]:
    """For a block that prints results. Ends the program if the pipe is closed; raises PrintError for other faults."""
    try:
        yield Page()
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_the_rest(sys.stdout)
        try:
            sys.stderr.flush()
        except OSError:  # the same pipe, with a line of progress still in it
            _drop_the_rest(sys.stderr)
        raise SystemExit(CLOSED) from None
    except OSError as error:
        _drop_the_rest(sys.stdout)
        raise PrintError(f"stdout cannot be written ({error.strerror}): send it somewhere else.") from None


def _drop_the_rest(stream: TextIO) -> None:
    """Discards what is still buffered: Python would try to write it again when it ends, and exit with 120."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


stderr = Notices(soft_wrap=True)


def show(
    data: dict[str, Any], table: RenderableType, as_json: bool, *, whole_lines: bool = False, escaped: bool = True
) -> None:
    """Prints what a command has found, as JSON or as a table.

    whole_lines: no line of the table is wrapped. escaped: letters beyond ASCII become escapes in JSON.
    """
    with printing() as page:
        if as_json:
            # JSON has no NaN and no infinity. Results have None instead; anything else raises here.
            print(json.dumps(data, indent=2, ensure_ascii=escaped, allow_nan=False))
        else:
            page.print(table, soft_wrap=whole_lines)
