"""Spellings of the release before, understood for one more release, with a warning."""

from collections.abc import Iterator, Sequence

from .terminal import stderr


def as_now(arguments: Sequence[str]) -> list[str]:
    """The command line in today's spelling: `scan --json FILE` is `scan --output FILE`. `--json` has become a flag."""
    command, *rest = arguments or [""]
    return [command, *_scan(rest)] if command == "scan" else list(arguments)


def _scan(arguments: Sequence[str]) -> Iterator[str]:
    rest = iter(zip(arguments, [*arguments[1:], ""], strict=True))
    for argument, following in rest:
        name, _, value = argument.partition("=")
        if name != "--json" or not (value or following.lower().endswith(".json")):
            yield argument
            continue
        file = value or following
        warning = f"--json is a flag now: write --output {file}. The next release no longer takes --json FILE."
        stderr.print(warning, markup=False)
        yield from ("--output", file)
        if not value:
            next(rest)
