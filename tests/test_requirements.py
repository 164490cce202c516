"""Where torch or transformers cannot be imported, every way in says which one, and why."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import qwen2_fp16_fix
from qwen2_fp16_fix import model_status, requirements
from tests.commands.in_process import run_command

ERRORS = {
    "torch": OSError("libcudart.so.12: cannot open shared object file\nat line 3"),
    "transformers": ImportError("tokenizers>=0.22 is required"),
    "transformers.modeling_utils": RuntimeError("Failed to import transformers.modeling_utils"),
    "transformers.models.auto.auto_factory": ModuleNotFoundError("No module named 'jinja2'"),
}


@pytest.fixture(params=ERRORS)
def broken(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """One module cannot be imported, and so none of ours that needs it. Returns how the sentence begins."""
    real: Callable[[str], ModuleType] = importlib.import_module

    def import_module(name: str, package: str | None = None) -> ModuleType:
        if name in (request.param, "qwen2_fp16_fix.registration.register"):
            raise ERRORS[request.param]
        return real(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    return str(request.param).partition(".")[0]


def test_a_public_name_says_what_is_broken(broken: str) -> None:
    with pytest.raises(qwen2_fp16_fix.BrokenInstallationError) as caught:
        _ = qwen2_fp16_fix.register
    said = str(caught.value)
    assert said.startswith(f"{broken} in ")
    assert str(caught.value.__cause__).partition("\n")[0] in said
    assert f"install --force-reinstall {broken}`" in said
    assert "\n" not in said
    assert isinstance(caught.value, ImportError)


def test_a_command_says_what_is_broken(
    broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def status() -> None:
        raise AttributeError("module 'transformers' has no attribute '__version__'")

    monkeypatch.setattr(model_status, "status", status)
    code, _, said = run_command(monkeypatch, capsys, "status")
    assert code == 3
    assert said.startswith(f"qwen2-fp16-fix: {broken} in ")
    assert "Traceback" not in said


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert requirements.broken_requirement() is None
    monkeypatch.setitem(qwen2_fp16_fix._HOME, "register", "no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        _ = qwen2_fp16_fix.register
