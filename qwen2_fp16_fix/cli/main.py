"""The command line as a program: its arguments are checked, its streams and signals made safe, and a command runs."""

import os
import sys

from .commands import app
from .endings import check_arguments, check_current_folder, ending_in_order, one_sentence
from .former import as_now
from .terminal import standard_streams


def let_threads_sleep() -> None:
    """Has threads of torch that wait for others sleep. By default they spin: on busy cores a run takes 6 times the CPU.

    OpenMP reads this once, as torch is imported.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Runs the command line. An error becomes one sentence on stderr and its exit code."""
    with ending_in_order(), standard_streams(), one_sentence():
        arguments = sys.argv[1:]
        check_arguments(arguments)
        check_current_folder()
        if arguments[:1] != ["run"]:  # a program that is run decides for itself
            let_threads_sleep()
        try:
            app(args=as_now(arguments), prog_name="qwen2-fp16-fix")
        finally:
            sys.stdout.flush()  # typer prints help and ends the program: else it would be Python that finds a full disk
