"""Runs a command in this process. No fixture of tests/conftest.py: the matrix's digest follows what that imports."""

import sys

import pytest

from qwen2_fp16_fix.cli import main


def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int | str | None, str, str]:
    """Runs `qwen2-fp16-fix` from `main` on, which turns errors into sentences: its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["qwen2-fp16-fix", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main.main()
    return ended.value.code, *capsys.readouterr()
