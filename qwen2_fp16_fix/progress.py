"""The argument `progress` of the public functions: True for a bar on stderr, a rich Console for a bar on that."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Progress = bool | Console | None
T = TypeVar("T")


def console_of(progress: Progress) -> Console | None:
    """The console to show progress on. None for False and None, which show none."""
    if isinstance(progress, Console):
        return progress
    return Console(stderr=True, highlight=False) if progress else None


def with_bar(items: Sequence[T], description: str, progress: Progress) -> Iterable[T]:
    """The items, with a bar that advances by one after each."""
    console = console_of(progress)
    return items if console is None else track(items, description, console=console)
