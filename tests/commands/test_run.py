"""Exit codes of the command line, and `qwen2-fp16-fix run`: an unchanged program, its children, its environment."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands.in_process import run_command
from tests.helpers import ROOT
from tests.stress import TINY, build

pytestmark = pytest.mark.process
COMMAND = ("-m", "qwen2_fp16_fix")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run",), 2, "nothing to run"),
        (("run", "--", "no-such-program-anywhere"), 2, "cannot find the program"),
        (("run", "--", "python", "-I", "-c", "0"), 2, "keeps the fix out"),
        (("run", "--", "python", "-sE", "x.py"), 2, "keeps the fix out"),
        (("run", "--", "python", "-c", "import sys; sys.exit(7)"), 7, ""),
        (("no-such-command",), 2, "No such command"),
        (("--version",), 0, ""),
    ],
)
def test_exit_codes(
    python: Callable[..., subprocess.CompletedProcess[str]], arguments: tuple[str, ...], code: int, words: str
) -> None:
    done = python(*COMMAND, *arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_status_ends_with_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Here: a program of its own takes seconds, and test_terminal.py has one."""
    code, _, complaint = run_command(monkeypatch, capsys, "status")
    assert (code, "Traceback" in complaint) == (0, False)


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a suffix says what can be run")
def test_a_program_that_the_system_cannot_run_is_wrong_usage(tmp_path: Path, python: Callable[..., Any]) -> None:
    """An executable without its first line `#!/bin/sh` was a traceback."""
    program = tmp_path / "program"
    program.write_text("echo ran")
    program.chmod(0o755)
    done = python(*COMMAND, "run", "--", str(program))
    assert done.returncode == 2
    assert done.stderr.startswith(f"qwen2-fp16-fix: {program} cannot be run (Exec format error)")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("__version__ = '4.36.2'\nclass Qwen2Config: pass\n", "transformers 4.36.2"),
        ("__version__ = '5.24.0'\n", "transformers in {} cannot be imported (ModuleNotFoundError: No module named"),
    ],
    ids=["unsupported", "files are missing"],
)
def test_run_with_a_transformers_that_cannot_be_fixed_ends_the_program(
    source: str, words: str, tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Going on with stock would be silent; an exception could be swallowed by the program."""
    package = tmp_path / "transformers"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    program = "try:\n    import transformers\nexcept Exception:\n    pass\nprint('went on')"
    done = python(*COMMAND, "run", "--", "python", "-c", program, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 3
    assert "went on" not in done.stdout
    assert done.stderr.startswith(f"qwen2-fp16-fix: {words.format(package)}")
    assert "install qwen2-fp16-fix" not in done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 checkpoint that breaks stock in eager."""
    path = tmp_path_factory.mktemp("checkpoint")
    build(TINY, ("scores", "residual"), attn_implementation="eager").half().save_pretrained(path)
    return path


LOADS = """
import sys, torch, transformers
for name in ("AutoModelForCausalLM", "Qwen2ForCausalLM"):
    kind = getattr(transformers, name)
    model = kind.from_pretrained(sys.argv[1], dtype=torch.float16, attn_implementation="eager")
    with torch.no_grad():
        print(bool(torch.isfinite(model(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])).logits).all()))
"""


def test_run_fixes_an_unchanged_program(
    folder: Path,
    tmp_path: Path,
    python: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through the Auto class and by the class's own name: the program cannot be asked."""
    script = tmp_path / "eval.py"
    script.write_text(LOADS)
    monkeypatch.setattr(sys, "argv", [str(script), str(folder)])
    runpy.run_path(str(script))  # stock
    assert capsys.readouterr().out.split() == ["False", "False"]
    done = python(*COMMAND, "run", "--", str(script), str(folder))
    assert (done.stdout.split(), done.returncode) == (["True", "True"], 0), done.stderr


def test_run_fixes_child_processes_and_modules(folder: Path, tmp_path: Path, python: Callable[..., Any]) -> None:
    (tmp_path / "child.py").write_text(LOADS)
    (tmp_path / "parent.py").write_text(
        "import subprocess, sys\nsys.exit(subprocess.call([sys.executable, '-m', 'child', *sys.argv[1:]]))"
    )
    done = python(*COMMAND, "run", "--", "-m", "parent", str(folder), PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (done.stdout.split(), done.returncode) == (["True", "True"], 0), done.stderr


def test_run_keeps_the_environments_own_sitecustomize(tmp_path: Path, python: Callable[..., Any]) -> None:
    """Coverage tools and distributions use one; the first on the path hides the others."""
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    done = python(*COMMAND, "run", "--", "python", "-c", "0", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.stdout.split() == ["theirs", "theirs"], done.stderr  # our own process, then the program
