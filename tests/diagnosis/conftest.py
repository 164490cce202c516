"""Machines that the doctor examines: a healthy one, and one with an owner."""

from pathlib import Path

import pytest

from qwen2_fp16_fix.diagnosis import doctor, remarks, self_test
from qwen2_fp16_fix.diagnosis.self_test import Outcome
from tests.diagnosis.examples import CPU, SECRET


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A known machine: no accelerator, no lock in the current folder, and a self-test that has passed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "devices", lambda: [CPU])
    passed = remarks.remark("self_test.passed", device="cpu", kl="1e-07", limit="2e-06")
    monkeypatch.setattr(self_test, "self_test", lambda place: Outcome([], True, passed))


@pytest.fixture
def somebodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose user, home, token, current folder and checkpoints can be recognised."""
    home = tmp_path / f"{SECRET}-home"
    for name in ("USER", "LOGNAME", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, f"hf_{SECRET}")
    monkeypatch.setenv("HOME", str(home))
    work = home / f"{SECRET} work"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    return work
