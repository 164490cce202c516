"""What is the same in every command: -h, --json, --output, examples and exit codes in the help, bars, completion."""

import io
import json
import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
from rich.console import Console

from qwen2_fp16_fix import demo, model_status, progress
from qwen2_fp16_fix.checkpoints.folder import open_checkpoint
from qwen2_fp16_fix.cli import commands, examples, former, main
from tests.commands.in_process import run_command

PROGRAM: Any = typer.main.get_command(commands.app)
COMMANDS = list(PROGRAM.commands)


def options_of(command: str) -> set[str]:
    return {option for parameter in PROGRAM.commands[command].params for option in parameter.opts}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns_and_ends_with_examples(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run_command(monkeypatch, capsys, *filter(None, [command]), "-h")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert all(part in out for part in ("Examples:", "Exit codes:", examples.LINK, "-h"))
    for example in examples.EXAMPLES[command]:
        assert f"qwen2-fp16-fix {example}\n" in "\n".join(line.rstrip() for line in out.splitlines()) + "\n"
        name, *arguments = shlex.split(example)
        PROGRAM.commands[name].make_context(name, arguments)  # raises for an option that is not there


def test_every_command_has_the_same_options() -> None:
    for command in COMMANDS:
        options = options_of(command)
        assert command == "run" or "--json" in options, command
        assert command in ("run", "export") or {"--output", "-o", "--force"} <= options, command
        assert command not in ("demo", "certify", "verify", "doctor", "scan") or "--lang" in options, command
        for parameter in PROGRAM.commands[command].params:
            assert "--json" not in parameter.opts or parameter.is_flag, command


def test_output_writes_a_file_and_nothing_over_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "status.json"
    code, out, said = run_command(monkeypatch, capsys, "status", "--json", "-o", str(file))
    assert (code, said) == (0, f"wrote {file}\n")
    assert json.loads(file.read_text(encoding="utf-8")) == json.loads(out)
    file.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(model_status, "status", lambda: pytest.fail("ran before the check"))
        code, _, said = run_command(patch, capsys, "status", "-o", str(file))
    assert (code, f"{file} exists: name another file, or add --force to overwrite it." in said) == (2, True)
    assert file.read_text() == "mine"
    assert run_command(monkeypatch, capsys, "status", "-o", str(file), "--force")[0] == 0
    assert json.loads(file.read_text())["enabled"]


@pytest.mark.parametrize(
    ("given", "now"),
    [
        ("scan DEMO --json out.json --stock", "scan DEMO --output out.json --stock"),
        ("scan --json out.JSON DEMO", "scan --output out.JSON DEMO"),
        ("scan DEMO --json=here", "scan DEMO --output here"),
    ],
)
def test_the_former_spelling_is_understood_with_a_warning(
    given: str, now: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert former.as_now(given.split()) == now.split()
    assert "--json is a flag now: write --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", ["scan DEMO --json", "scan --json DEMO", "certify --json x.json", "run -- x --json=y", ""]
)
def test_no_other_line_is_changed(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert former.as_now(given.split()) == given.split()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("qwen2-fp16-fix ve", ["verify"]),
        ("qwen2-fp16-fix scan --pr", ["--prompts"]),
        ("qwen2-fp16-fix scan --lang z", ["zh"]),
    ],
)
def test_bash_completes(
    words: str, completed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_QWEN2_FP16_FIX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    code, out, _ = run_command(monkeypatch, capsys)
    assert (code, out.split()) == (0, completed)


@pytest.mark.parametrize(("command", "sleep"), [("status", True), ("run", False)])
def test_threads_that_wait_sleep_but_not_in_a_program_that_is_run(
    command: str, sleep: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(main, "app", lambda **_: sys.exit(0))
    monkeypatch.setattr(main, "sys", SimpleNamespace(argv=["x", command], stdout=sys.stdout, modules={}))
    run_command(monkeypatch, capsys, command)
    assert os.environ.get("OMP_WAIT_POLICY") == ("PASSIVE" if sleep else None)


def screen(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, legacy_windows=False)


def test_a_bar_moves_on_a_terminal_and_is_one_line_elsewhere() -> None:
    shown, log = screen(True), screen(False)
    for console in (shown, log):
        with progress.bar("verifying", 3, console) as bar:
            for name in ("first", "second", "third"):
                bar.name(name)
                bar.advance()
        with progress.working("loading", console):
            pass
    assert log.file.getvalue() == "verifying …\nloading …\n"
    assert "verifying: third" in shown.file.getvalue()
    assert shown.file.getvalue().endswith("\x1b[2K")  # the line is empty at the end
    with progress.bar("verifying", 3, None) as bar:
        bar.name("first")
        bar.advance()


def test_the_demos_window_is_that_of_its_training() -> None:
    """`verify` took 1,024 tokens at a time from a config that said so, and fp32 itself was lost behind 256."""
    trained = json.loads((demo.CHECKPOINT / "TRAINING.json").read_text())["recipe"]["length"]
    assert open_checkpoint(demo.CHECKPOINT).shape.positions == trained == demo.WINDOW
