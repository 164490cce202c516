"""A scan's result: the JSON it always was, key by key, one line in a REPL, the terminal's table, and its two files."""

import builtins
import io
import json
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import qwen2_fp16_fix
from qwen2_fp16_fix.progress import console_of
from qwen2_fp16_fix.report import files
from qwen2_fp16_fix.scanning.result import ScanResult
from tests.helpers import skeleton
from tests.scanning.planted import PROMPT, command, text_of

pytestmark = pytest.mark.xdist_group("scan")  # one worker builds the checkpoints, for all

RECORDED = Path(__file__).parent / "recorded_scan.json"


@pytest.fixture(scope="module")
def planted(folders: Callable[..., Path]) -> ScanResult:
    folder = folders("scores", "residual", "swiglu", "massive")
    return qwen2_fp16_fix.scan(folder, text_of(PROMPT), device="cpu")


def test_plain_data_is_what_it_was_as_a_dict(planted: ScanResult) -> None:
    """Recorded when `scan` returned a dict: every key, in the same order, with a value of the same kind."""
    recorded, found = json.loads(RECORDED.read_text(encoding="utf-8")), json.loads(json.dumps(planted.to_dict()))
    assert skeleton(found) == skeleton(recorded)
    assert [(site["layer"], site["site"]) for site in found["sites"]] == [
        (site["layer"], site["site"]) for site in recorded["sites"]
    ]
    for site, before in zip(found["sites"], recorded["sites"], strict=True):
        assert site["largest"] == pytest.approx(before["largest"], rel=1e-3)  # another torch may round otherwise
    assert found["first_nonfinite"] == recorded["first_nonfinite"]
    assert found["verdict"] == recorded["verdict"]


def test_a_result_is_one_line_in_a_repl_and_cannot_be_changed(planted: ScanResult) -> None:
    """A scan of four tokens printed 21,171 characters."""
    assert repr(planted) == f"<ScanResult: {planted.verdict}>"
    assert "\n" not in repr(planted)
    assert len(repr(planted)) < 300
    with pytest.raises(FrozenInstanceError):
        planted.finite = True  # type: ignore[misc]


@pytest.mark.parametrize("width", [80, 120])
def test_rich_prints_the_table_of_the_command(
    folders: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """Also where stdout is no terminal."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(text_of(PROMPT))
    monkeypatch.setenv("COLUMNS", str(width))
    printed = command(folders("scores"), "--prompts", prompts).stdout
    page = io.StringIO()
    Console(file=page, width=width).print(qwen2_fp16_fix.scan(folders("scores"), prompts, device="cpu"))
    assert page.getvalue() == printed
    assert max(map(len, printed.splitlines())) <= width


def test_a_notebook_shows_the_same_table(planted: ScanResult) -> None:
    html = planted._repr_html_()
    assert html.startswith("<pre style=")
    assert "down_proj" in html
    assert planted.verdict.split(",")[0] in " ".join(re.sub("<[^>]*>", "", html).split())


def test_a_scan_saves_a_page_and_a_picture(planted: ScanResult, tmp_path: Path) -> None:
    planted.save_html(tmp_path / "page.html")
    planted.save_html(str(tmp_path / "zh.html"), language="zh")
    planted.save_png(tmp_path / "picture.png")
    assert '<html lang="en">' in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<html lang="zh-CN">' in (tmp_path / "zh.html").read_text(encoding="utf-8")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("save", ["save_html", "save_png"])
def test_a_file_that_exists_is_overwritten_by_force_alone(planted: ScanResult, tmp_path: Path, save: str) -> None:
    there = tmp_path / "there"
    there.write_text("mine")
    with pytest.raises(qwen2_fp16_fix.ScanError, match="exists: name another file, or add force=True"):
        getattr(planted, save)(there)
    assert there.read_text() == "mine"
    getattr(planted, save)(there, force=True)
    assert there.read_bytes() != b"mine"
    with pytest.raises(qwen2_fp16_fix.ScanError, match="it is a folder"):
        getattr(planted, save)(tmp_path, force=True)


def test_a_missing_extra_is_one_sentence_that_names_the_method(
    planted: ScanResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    for save, sentence in (
        (planted.save_html, "save_html needs matplotlib and jinja2"),
        (planted.save_png, "save_png needs"),
    ):
        with pytest.raises(qwen2_fp16_fix.ScanError, match=sentence):
            save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_progress_is_a_bar_on_stderr_or_nothing(
    folders: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """True was a traceback: a bool is no rich Console."""
    console = Console(quiet=True)
    assert console_of(console) is console
    assert console_of(False) is console_of(None) is None
    for progress, bar in ((True, True), (False, False)):
        qwen2_fp16_fix.scan(folders("keys"), [[1, 2, 3]], device="cpu", progress=progress)
        said = capsys.readouterr()
        assert said.out == ""
        assert ("scanning layers" in said.err) == bar
        assert ("bounding layers" in said.err) == bar


def test_a_report_needs_no_extra_until_it_is_written(monkeypatch: pytest.MonkeyPatch, planted: ScanResult) -> None:
    """A scan runs, and is printed, without jinja2 and matplotlib."""
    plain = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        assert name.partition(".")[0] not in ("jinja2", "matplotlib"), name
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    Console(file=io.StringIO()).print(planted)
    assert planted.to_dict()["finite"] is False
