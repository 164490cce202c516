"""What a command prints, to a stdout that may be a closed pipe, a full disk, or in an alphabet without our signs."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from rich.console import Console

CLOSED = 128 + 13  # what a shell says of a program that SIGPIPE has ended


class PrintError(Exception):
    """What was found cannot be printed."""


class Page(Console):
    """Stdout without rich's markup: a token `[/INST]` is printed as it stands."""

    def __init__(self) -> None:
        """As wide as the terminal."""
        super().__init__(markup=False)

    def on_broken_pipe(self) -> None:
        """Left to `printing`: rich's own ends the program with 1, which is a finding here."""
        raise BrokenPipeError


class Notices(Console):
    """Stderr; where nobody reads it any more, the run goes on in silence."""

    def __init__(self, soft_wrap: bool = False) -> None:
        """soft_wrap: lines are left as long as they are, for those who search them."""
        super().__init__(stderr=True, highlight=False, soft_wrap=soft_wrap)

    def on_broken_pipe(self) -> None:
        """A run of minutes is not lost for a line of progress."""
        self.quiet = True


def replace_unknown_signs() -> None:
    """Has stdout print a `?` for a sign that its encoding lacks, in place of failing after the run."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def printing() -> Iterator[Console]:
    """Around what prints findings. Ends the program where the pipe is closed; raises PrintError for other faults."""
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
    """Python would try to write it once more when it ends, and complain with 120."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
