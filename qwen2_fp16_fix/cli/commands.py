"""The commands, in the order of the help. Their options are in `checks.py` and `production.py`."""

from typing import Annotated

import typer

from .._version import __version__
from .checks import certify, demo, doctor, scan, status, verify
from .endings import guarded
from .production import check, export, lock, push, run
from .terminal import printing

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        with printing():
            print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Qwen2 and Qwen2.5 in float16 without NaN."""


#: The options of the program that is run are its own.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}

for command in (demo, certify, verify, export, push, doctor, scan, run, status, lock, check):
    app.command(context_settings=PASSED_ON if command is run else None)(guarded(command))
