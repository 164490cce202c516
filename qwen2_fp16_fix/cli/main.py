"""The command line as a program: its arguments are checked, its streams and signals made safe, and a command runs."""

import sys

from .commands import app
from .endings import check_arguments, check_current_folder, ending_in_order, one_sentence
from .terminal import standard_streams


def main() -> None:
    """Runs the command line. An error becomes one sentence on stderr and its exit code."""
    with ending_in_order(), standard_streams(), one_sentence():
        check_arguments(sys.argv[1:])
        check_current_folder()
        try:
            app()
        finally:
            sys.stdout.flush()  # typer prints help and ends the program: else it would be Python that finds a full disk
