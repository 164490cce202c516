"""Runs an unchanged program with the fix registered, in its child processes as well."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

STARTUP = Path(__file__).parent / "startup"


class UsageError(Exception):
    """The command line cannot be run as given."""

    exit_code = 2


def command_for(arguments: Sequence[str]) -> list[str]:
    """The command to start. `-m module` and `script.py` run under this interpreter, anything else as it is.

    Raises UsageError for an empty or unknown command, and for switches of Python that would keep the fix out.
    """
    if not arguments:
        raise UsageError("nothing to run: write the program after `--`, as in `qwen2-fp16-fix run -- python eval.py`.")
    first = arguments[0]
    command = [sys.executable, *arguments] if first == "-m" or first.endswith(".py") else list(arguments)
    program = shutil.which(command[0])
    if program is None:
        raise UsageError(f"cannot find the program {command[0]!r}: check its name, or give its full path.")
    if re.fullmatch(r"python[\d.]*(\.exe)?", Path(command[0]).name):
        _refuse_isolation(command[1:])
    return [program, *command[1:]]


def _refuse_isolation(switches: Sequence[str]) -> None:
    """Raises UsageError for -E, -I and -S, with which Python reads neither PYTHONPATH nor sitecustomize.

    They are read letter by letter, as Python reads them. -W and -X take the next argument. -c and -m end the switches.
    """
    rest = iter(switches)
    for switch in rest:
        if switch in ("-", "--") or not switch.startswith("-"):
            return
        if switch == "--check-hash-based-pycs":  # the only long switch with an argument
            next(rest, None)
        for place, letter in enumerate("" if switch.startswith("--") else switch[1:], start=2):
            if letter in "EIS":
                raise UsageError(f"python {switch} keeps the fix out of the process: run it without -E, -I and -S.")
            if letter in "cm":
                return
            if letter in "WX":
                if not switch[place:]:
                    next(rest, None)
                break


def environment_for(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with PYTHONPATH begun by the folder that registers the fix. Child processes inherit it."""
    path = os.pathsep.join(filter(None, (str(STARTUP), environment.get("PYTHONPATH"))))
    return {**environment, "PYTHONPATH": path}


def run(arguments: Sequence[str]) -> int:
    """Runs the program and returns its exit code. On POSIX the program replaces this process, and nothing returns."""
    command, environment = command_for(arguments), environment_for(os.environ)
    try:
        if os.name == "posix":
            sys.stdout.flush()
            os.execve(command[0], command, environment)
        return subprocess.run(command, env=environment, check=False).returncode
    except OSError as error:
        raise UsageError(f"{command[0]} cannot be run ({error.strerror}): name the program that runs it.") from None
