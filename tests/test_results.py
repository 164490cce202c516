"""What status, certify, check and doctor return: the JSON they always were, one line, a table, a page."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import qwen2_fp16_fix as q
from qwen2_fp16_fix import demo, locking
from qwen2_fp16_fix.cli import commands
from qwen2_fp16_fix.diagnosis import doctor, self_test
from qwen2_fp16_fix.diagnosis.devices import Device
from qwen2_fp16_fix.diagnosis.remarks import remark
from qwen2_fp16_fix.diagnosis.self_test import Outcome
from qwen2_fp16_fix.progress import console_of, with_bar
from qwen2_fp16_fix.results import Result
from tests.helpers import skeleton
from tests.stress import TINY, build

#: Recorded when these functions returned dicts, and `check` a list; with the keys that have been added since.
RECORDED = json.loads((Path(__file__).parent / "recorded_results.json").read_text(encoding="utf-8"))


def unprovable() -> Any:
    model = build(TINY, ()).half()
    with torch.no_grad():
        for linear in (model.model.layers[2].mlp.gate_proj, model.model.layers[2].mlp.up_proj):
            linear.weight[5] = 6e4  # parallel: their product may be 1e14, which asks for more than 24 bits
    return model


def drifted() -> Result:
    content = locking.make_lock() | {"torch": "2.4.0", "numerics": 99}
    Path("lock.json").write_text(locking.as_text(content))
    return q.check("lock.json")


MAKE: dict[str, Callable[[], Result]] = {
    "status": q.status,
    "status of a stock model": lambda: q.status(build(TINY, ())),
    "status of a fixed model": lambda: q.status(q.fix(build(TINY, ()).half())),
    "certify": lambda: q.certify(demo.CHECKPOINT),
    "certify what is not proven": lambda: q.certify(unprovable()),
    "check": drifted,
    "doctor": lambda: q.doctor(demo.CHECKPOINT),
}
COMMANDS = {
    "status": ["status"],
    "certify": ["certify", str(demo.CHECKPOINT)],
    "check": ["check", "lock.json"],
    "doctor": ["doctor", str(demo.CHECKPOINT)],
}


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine of the record: a CPU, no lock in the current folder, and a self-test that has passed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "devices", lambda: [Device("cpu", "cpu", "a CPU")])
    passed = remark("self_test.passed", device="cpu", kl="1e-07", limit="2e-06")
    monkeypatch.setattr(self_test, "self_test", lambda place: Outcome([], True, passed))


def as_read(data: dict[str, Any]) -> Any:
    """Without what differs from one environment to the next: the tools that are installed, and values of settings."""
    if "tools" in data:
        settings = [item | {"value": None} for item in data["settings"]]
        data = data | {"tools": data["tools"][:1], "settings": settings}
    return skeleton(data)


@pytest.mark.parametrize("case", MAKE)
def test_plain_data_is_what_it_was_as_a_dict(case: str) -> None:
    """Every key, in the same order, with a value of the same kind: programs read what `--json` prints."""
    found = json.loads(json.dumps(MAKE[case]().to_dict(), allow_nan=False))
    assert as_read(found) == as_read(RECORDED[case])
    for key in ("proven", "passed", "healthy"):
        assert found.get(key) == RECORDED[case].get(key)


@pytest.mark.parametrize("case", MAKE)
def test_a_result_is_one_line_in_a_repl_and_cannot_be_changed(case: str) -> None:
    found = MAKE[case]()
    assert "\n" not in repr(found)
    assert len(repr(found)) < 400
    assert repr(found).startswith(f"<{type(found).__name__}: ")
    with pytest.raises(FrozenInstanceError):
        setattr(found, fields(found)[0].name, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("case", COMMANDS)
def test_rich_prints_what_the_command_prints(case: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole lines where programs read them, and where code is there to be copied."""
    found, page = MAKE[case](), io.StringIO()
    Console(file=page, width=width).print(found, soft_wrap=case != "certify")
    monkeypatch.setenv("COLUMNS", str(width))
    assert CliRunner().invoke(commands.app, COMMANDS[case]).stdout == page.getvalue()


@pytest.mark.parametrize("case", MAKE)
def test_a_notebook_shows_the_same_table(case: str) -> None:
    found = MAKE[case]()
    html = found._repr_html_()
    assert html.startswith("<pre style=")
    shown = " ".join(re.sub("<[^>]*>", "", html).split())
    assert {"status": "numerics", "certify": "tightest site", "check": "is locked.", "doctor": "What was checked"}[
        case.split()[0]
    ] in shown


def test_progress_is_a_bar_on_stderr_or_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """True was a traceback: a bool is no rich Console."""
    assert q.certify(demo.CHECKPOINT, progress=True).proven
    assert "bounding layers" in capsys.readouterr().err
    assert q.certify(demo.CHECKPOINT).proven
    assert capsys.readouterr().err == ""
    console = Console(file=io.StringIO(), width=80)
    assert console_of(console) is console
    assert list(with_bar(range(3), "counting", console)) == [0, 1, 2]
