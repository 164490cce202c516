"""The argument `progress` of the public functions: True for a bar on stderr, a rich Console for a bar on that.

A bar goes once it is full. Where nobody can see one move, as in a log, it is one line at the beginning.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar

Progress = bool | Console | None
T = TypeVar("T")


def console_of(progress: Progress) -> Console | None:
    """The console to show progress on. None for False and None, which show none."""
    if isinstance(progress, Console):
        return progress
    return Console(stderr=True, highlight=False) if progress else None


class Bar:
    """A bar that is shown, or one that is not."""

    def __init__(self, shown: RichBar | None, description: str, total: int) -> None:
        """shown: None to show none."""
        self._shown, self._description = shown, description
        self._task = None if shown is None else shown.add_task(description, total=total)

    def name(self, step: str) -> None:
        """Names the step that runs."""
        if self._shown is not None and self._task is not None:
            self._shown.update(self._task, description=f"{self._description}: {step}")

    def advance(self, steps: int = 1) -> None:
        """So many more steps are done."""
        if self._shown is not None and self._task is not None:
            self._shown.advance(self._task, steps)


@contextmanager
def bar(description: str, total: int, progress: Progress) -> Iterator[Bar]:
    """For a block of `total` steps: shows how many are done."""
    console = console_of(progress)
    if console is None or not can_move(console):
        if console is not None:
            console.print(f"{description} …", markup=False, highlight=False)
        yield Bar(None, description, total)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with RichBar(*columns, console=console, transient=True) as shown:
        yield Bar(shown, description, total)


def with_bar(items: Sequence[T], description: str, progress: Progress) -> Iterable[T]:
    """The items, with a bar that advances by one after each."""
    with bar(description, len(items), progress) as shown:
        for item in items:
            yield item
            shown.advance()


@contextmanager
def working(sentence: str, progress: Progress) -> Iterator[None]:
    """For a block whose steps cannot be counted: says what it does."""
    console = console_of(progress)
    if console is None:
        yield
    elif can_move(console):
        with console.status(sentence):
            yield
    else:
        console.print(f"{sentence} …", markup=False, highlight=False)
        yield


def can_move(console: Console) -> bool:
    """Whether what is printed can be replaced: on a terminal and in a notebook."""
    return console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)
