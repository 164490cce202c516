"""Printing to a stdout that may be a closed pipe or a full disk, or whose encoding may lack our characters."""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from rich.console import Console, RenderableType

from .output import as_json_text, write_output

CLOSED = 128 + 13  # the exit code that a shell gives a program ended by SIGPIPE


class PrintError(Exception):
    """The result cannot be printed."""

    exit_code = 2


class Stream:
    """A standard stream, on which each fault of the system goes to a function instead of through the program."""

    def __init__(self, stream: TextIO, fault: Callable[[OSError], None]) -> None:
        """fault: called with each OSError of a write."""
        self._stream, self._fault = stream, fault

    def write(self, text: str) -> int:
        """Writes the text, or leaves the fault to the function."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._fault(error)
            return len(text)

    def flush(self) -> None:
        """Writes what is buffered, or leaves the fault to the function."""
        try:
            self._stream.flush()
        except OSError as error:
            self._fault(error)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's own."""
        return getattr(self._stream, name)


@contextmanager
def standard_streams() -> Iterator[None]:
    """For a block that is the program: a stdout or stderr that is closed, full or without our signs does not crash it.

    A fault of stdout ends the program: its reader has gone, or the result cannot be printed. One of stderr does not:
    a run of minutes must not be lost for a line of progress, nor an exit code for a sentence.
    """
    _fill_closed_descriptors()
    stdout, stderr = sys.stdout, sys.stderr
    if isinstance(stdout, io.TextIOWrapper):
        stdout.reconfigure(errors="replace")  # prints `?` for a character that its encoding lacks
    with open(os.devnull, "w", encoding="utf-8") as nowhere, ExitStack() as streams:
        ours = Stream(stdout, _end) if stdout is not None else Stream(Closed(), _end)
        streams.enter_context(redirect_stdout(ours))
        streams.enter_context(redirect_stderr(Stream(stderr or nowhere, lambda error: _drop_the_rest(stderr))))
        yield


class Closed(io.StringIO):
    """Stands for a stdout that was closed before the program started. Python has none then, and prints to nothing."""

    def write(self, text: str) -> int:
        """Raises OSError."""
        raise OSError(errno.EBADF, "it is closed")


def _fill_closed_descriptors() -> None:
    """Opens what was closed of the descriptors 0 to 2. Else the next file would get the number, and stderr's text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _end(error: OSError) -> NoReturn:
    """Ends the program if the reader of stdout has gone. Raises PrintError for other faults."""
    _drop_the_rest(sys.stdout)
    if isinstance(error, BrokenPipeError):
        raise SystemExit(CLOSED)
    raise PrintError(f"stdout cannot be written ({error.strerror}): send it somewhere else.")


def _drop_the_rest(stream: TextIO) -> None:
    """Discards what is still buffered: Python would try to write it again when it ends, and exit with 120."""
    with suppress(OSError, ValueError):  # io.UnsupportedOperation is both
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)


class Page(Console):
    """Stdout without rich's markup, so that a token `[/INST]` is printed as it stands."""

    def __init__(self) -> None:
        """As wide as the terminal."""
        super().__init__(markup=False)


class Notices(Console):
    """Stderr."""

    def __init__(self, soft_wrap: bool = False) -> None:
        """soft_wrap: lines are not wrapped, so that programs can search them."""
        super().__init__(stderr=True, highlight=False, soft_wrap=soft_wrap)


@contextmanager
def printing() -> Iterator[Console]:
    """For a block that prints results. A fault shows when it ends, not when Python does."""
    yield Page()
    sys.stdout.flush()


stderr = Notices(soft_wrap=True)


def show(
    data: dict[str, Any],
    table: RenderableType,
    as_json: bool,
    *,
    output: Path | None = None,
    whole_lines: bool = False,
    escaped: bool = True,
) -> None:
    """Prints what a command has found, as JSON or as a table, and writes it to a file if one is named.

    whole_lines: no line of the table is wrapped. escaped: letters beyond ASCII become escapes in printed JSON.
    """
    try:
        if output is not None:
            write_output(output, data)
            stderr.print(f"wrote {output}", markup=False)
    finally:  # what took minutes is shown even if it cannot be written
        with printing() as page:
            if as_json:
                print(as_json_text(data, escaped))
            else:
                page.print(table, soft_wrap=whole_lines)


@contextmanager
def loading() -> Iterator[None]:
    """For a block that imports torch and transformers, which takes seconds: a terminal shows that something happens."""
    from ..progress import can_move, working

    if "torch" in sys.modules or not can_move(stderr):
        yield
        return
    with working("loading torch and transformers", stderr):
        yield
