"""The commands, in the order of the help. Their options are in `checks.py` and `production.py`."""

from typing import Annotated

import typer

from .._version import __version__
from .checks import certify, demo, doctor, scan, status, verify
from .endings import guarded
from .examples import epilog
from .production import check, export, lock, push, run
from .terminal import printing

HELP = {"help_option_names": ["-h", "--help"]}
#: The options of the program that is run are its own.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, context_settings=HELP, epilog=epilog(""))


def _print_version(wanted: bool) -> None:
    if wanted:
        with printing():
            print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", metavar="", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Qwen2 and Qwen2.5 in float16 without NaN."""


for command in (demo, doctor, scan, certify, verify, run, export, push, status, lock, check):
    app.command(
        context_settings=HELP | (PASSED_ON if command is run else {}),
        options_metavar="[OPTIONS] -- PROGRAM [ARGS]..." if command is run else "[OPTIONS]",
        epilog=epilog(command.__name__),
    )(guarded(command))
