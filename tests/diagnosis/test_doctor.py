"""The doctor's report as a whole: its findings, its verdict, its text and its exit code."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from rich.console import Console
from typer.testing import CliRunner

import qwen2_fp16_fix
from qwen2_fp16_fix import demo, locking
from qwen2_fp16_fix.cli import commands
from qwen2_fp16_fix.demo import CHECKPOINT
from qwen2_fp16_fix.diagnosis import doctor, self_test
from qwen2_fp16_fix.diagnosis.self_test import SelfTests
from qwen2_fp16_fix.patches import modeling_qwen2_fp16
from qwen2_fp16_fix.translations import DOCTOR_TEXTS
from tests.diagnosis.examples import SECRET, codes, pretend_release

REAL_SELF_TEST = self_test.self_test


def test_a_healthy_machine_is_called_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real thing, self-test and checkpoint included."""
    monkeypatch.chdir(tmp_path)
    found = qwen2_fp16_fix.doctor(CHECKPOINT)
    assert found.healthy, found.findings
    assert found.exit_code == 0
    assert found.verdict.startswith("Breaks in stock float16: residual after attention of layer 2 reaches 73,728")
    assert qwen2_fp16_fix.doctor().verdict.startswith("Ready: run Qwen2 here in ")
    assert {result.device for result in found.self_test.results} >= {"cpu"}
    assert found.checkpoint.proven
    assert found.versions["transformers"] == transformers.__version__
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()


def test_a_failed_self_test_is_a_finding(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "self_test", REAL_SELF_TEST)
    monkeypatch.setattr(modeling_qwen2_fp16, "exchange_all", lambda *args, **kwargs: None)
    found = qwen2_fp16_fix.doctor()
    assert codes(found.findings) == ["self_test.not_finite"]
    assert "fixed float16 eager is not finite on cpu" in found.verdict
    assert found.exit_code == 1


def test_switched_off_is_a_finding(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_FP16_FIX", "0")
    found = qwen2_fp16_fix.doctor()
    assert codes(found.findings) == ["fix.off"]
    assert found.exit_code == 1
    monkeypatch.undo()
    monkeypatch.setenv("QWEN2_FP16_FIX", "0")
    assert not self_test.self_test("cpu").passed  # really off, not only said to be


def test_an_unsupported_release_exits_3(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_release(monkeypatch, "4.36.2")
    found = qwen2_fp16_fix.doctor()
    assert found.exit_code == 3
    assert not found.healthy
    assert "4.36.2" in found.verdict
    assert found.advice == []  # its code would end in the same error
    assert found.self_test == SelfTests(self_test.KL_LIMIT, DOCTOR_TEXTS["en"]["self_test.skipped"], [])


UNSUPPORTED = """
import transformers
transformers.__version__ = "4.36.2"
import qwen2_fp16_fix
found = qwen2_fp16_fix.doctor()
print(found.exit_code, found.supported, [finding.code for finding in found.findings])
"""


@pytest.mark.process
def test_the_doctor_runs_without_a_supported_transformers(python: Callable[..., Any], tmp_path: Path) -> None:
    """The entry of patches/ cannot be imported there, so nothing that the doctor imports first may import it."""
    (tmp_path / "ask.py").write_text(UNSUPPORTED)
    done = python(str(tmp_path / "ask.py"))
    assert done.stdout == "3 False ['fix.unusable']\n", done.stderr


def test_the_report_says_whether_the_fix_is_registered(healthy: None) -> None:
    assert not qwen2_fp16_fix.doctor().fix.registered
    with qwen2_fp16_fix.registered():
        found = qwen2_fp16_fix.doctor().fix
    assert found.registered
    assert found.text == DOCTOR_TEXTS["en"]["fix.registered"]


@pytest.mark.usefixtures("healthy")
def test_a_lock_in_the_current_folder_is_checked() -> None:
    assert qwen2_fp16_fix.doctor().lock.state == "none"
    file = qwen2_fp16_fix.lock(locking.FILE_NAME)
    assert qwen2_fp16_fix.doctor().lock.state == "kept"
    file.write_text(file.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    found = qwen2_fp16_fix.doctor()
    assert found.lock.state == "drifted"
    assert "1.0 is locked" in found.lock.differences[0]
    assert codes(found.findings) == ["lock.drifted"]


@pytest.mark.usefixtures("healthy")
def test_the_lock_that_the_environment_names_is_checked(somebodys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process was pinned, and doctor said "not pinned: no lock here"."""
    lock = qwen2_fp16_fix.lock(somebodys / f"{SECRET}.json")
    monkeypatch.setenv("QWEN2_FP16_FIX_LOCK", f" {lock.name} ")
    assert qwen2_fp16_fix.doctor().lock.state == "kept"
    lock.write_text(lock.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    shutil.copy(lock, locking.FILE_NAME)  # the same difference is said once
    assert qwen2_fp16_fix.doctor().lock.differences == [f"torch {torch.__version__} is installed, 1.0 is locked."]
    lock.unlink()
    Path(locking.FILE_NAME).unlink()
    found = qwen2_fp16_fix.doctor().lock
    assert "cannot be read as a lock" in found.differences[0]
    assert SECRET not in found.differences[0]


@pytest.mark.usefixtures("healthy")
def test_an_exported_folder_is_held_against_its_own_lock(tmp_path: Path) -> None:
    """By its files alone: it was made somewhere else, with another torch."""
    out = qwen2_fp16_fix.export(demo.CHECKPOINT, tmp_path / "out")
    lock = out / locking.FILE_NAME
    lock.write_text(lock.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    assert qwen2_fp16_fix.doctor(out).lock.state == "kept"
    with (out / "key_centring.py").open("a") as file:
        file.write("# edited")
    found = qwen2_fp16_fix.doctor(out)
    assert found.lock.differences == ["key_centring.py is not the file that was locked."]


def shown(page: Any, width: int = 80) -> str:
    with Console(width=width, record=True, file=io.StringIO()) as console:
        console.print(page, soft_wrap=True)
    return console.export_text()


class Command:
    """The command, in this process."""

    runner: ClassVar = CliRunner()

    def __call__(self, *arguments: str) -> Any:
        return self.runner.invoke(commands.app, ["doctor", *arguments])


def test_text_and_json_are_the_same_data(healthy: None) -> None:
    """Every sentence of the JSON is on the page, in both languages."""
    for language in DOCTOR_TEXTS:
        found = json.loads(Command()("--json", "--lang", language).stdout)
        page = shown(qwen2_fp16_fix.doctor(language=language).details())
        together = re.sub(r"\s", "", page)
        said = [found["verdict"], found["fix"]["text"], found["lock"]["text"], found["self_test"]["text"]]
        said += [item["text"] for item in found["tools"]]
        said += [item["text"] for item in found["settings"] if item["applies"]]
        said += [found["advice"][0]["reason"], *found["advice"][0]["also"], found["self_test"]["results"][0]["text"]]
        for sentence in said:
            assert re.sub(r"\s", "", sentence) in together
        assert not re.search(" $", page, re.M)
        assert found["advice"][0]["code"].splitlines()[-1] in page  # whole: it is there to be copied
        for part in (found["verdict"], page):
            assert bool(re.search("[一-鿿]", part)) is (language == "zh")


def test_the_page_lists_all_that_is_wrong(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_FP16_FIX", "0")
    monkeypatch.setattr(doctor, "lock_differences", lambda path: ["key_centring.py differs.", "torch differs."])
    done = Command()()
    assert done.exit_code == 1
    assert done.stdout.startswith("Something is wrong: QWEN2_FP16_FIX=0 is set")
    assert "and 1 more below" in re.sub(r"\s+", " ", done.stdout)
    assert "What is wrong" in done.stdout
    assert "key_centring.py differs." in done.stdout
    assert "torch differs." in done.stdout


def test_code_stays_whole_in_a_coloured_terminal(healthy: None) -> None:
    """Colours come and the code stays whole."""
    found = qwen2_fp16_fix.doctor()
    with Console(force_terminal=True, color_system="standard", width=60, record=True, file=io.StringIO()) as console:
        console.print(found, soft_wrap=True)
    plain = console.export_text(clear=False)
    assert found.advice[0].code.splitlines()[-1] in plain
    assert "\x1b[" in console.export_text(styles=True)


def test_exit_codes_of_the_command(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Command()().exit_code == 0
    assert Command()("--lang", "tlh").exit_code == 2
    assert isinstance(Command()("absent").exception, qwen2_fp16_fix.CheckpointError)  # 2, as every such error
    pretend_release(monkeypatch, "4.36.2")
    assert Command()().exit_code == 3
