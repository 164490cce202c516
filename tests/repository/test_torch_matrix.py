"""The record of torch versions: which it has, whether it is up to date, and that the handbook shows it."""

import json
import re
from pathlib import Path

import pytest
from packaging.version import Version

from qwen2_fp16_fix.patches.version_map import NEWEST_TESTED, RANGES, range_for
from tools import matrix, torch_matrix
from tools.matrix_environments import Environments


def record() -> dict[str, dict[str, dict[str, dict[str, object]]]]:
    found: dict[str, dict[str, dict[str, dict[str, object]]]] = json.loads(torch_matrix.RECORD.read_text())
    return found


def test_the_record_is_up_to_date_and_all_passed() -> None:
    """The handbook claims what ran; a change of the patches takes the claim away until it ran again."""
    assert record()["digest"] == matrix.digest(), "the patches or the suite have changed: run `make matrix-torch`"
    ran = record()["torch"]
    assert {torch: tuple(outcomes) for torch, outcomes in ran.items()} == torch_matrix.PAIRS
    assert [(t, v, o["problem"]) for t, found in ran.items() for v, o in found.items() if o["problem"]] == []


def test_the_page_shows_the_record() -> None:
    text = matrix.PAGE.read_text(encoding="utf-8")
    shown = text.partition(torch_matrix.BEGIN)[2].partition(torch_matrix.END)[0]
    assert shown.strip() == torch_matrix.table(record()), "run `make matrix-torch`"


def test_the_oldest_torch_and_the_matrix_own_are_among_them() -> None:
    """Each with an old transformers and the newest that takes this torch."""
    required = re.search(r'"torch>=([0-9.]+)"', (matrix.ROOT / "pyproject.toml").read_text())
    assert required is not None
    versions = list(torch_matrix.PAIRS)
    assert versions == sorted(versions, key=Version)
    assert Version(versions[0]) == Version(required[1])
    assert matrix.TORCH in versions
    for torch, releases in torch_matrix.PAIRS.items():
        assert range_for(releases[0]) == RANGES[0]
        assert releases[-1] == NEWEST_TESTED or torch == "2.4.0"  # transformers 5.17 and later refuse it
        assert set(releases) <= {release.version for release in matrix.listed()}


def test_each_torch_has_an_environment_and_results_of_its_own(tmp_path: Path) -> None:
    """Or an outcome with one torch would count for another."""
    first, second = (Environments(tmp_path, torch, base=torch) for torch in ("2.4.0", "2.6.0"))
    assert first.python != second.python
    assert first.result("4.37.0") != second.result("4.37.0") != Environments(tmp_path, "2.13.0").result("4.37.0")


def test_a_run_of_some_versions_writes_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of all does, failures included."""
    outcomes = {"2.4.0": "", "2.6.0": "test_a failure"}
    monkeypatch.setattr(torch_matrix, "PAIRS", dict.fromkeys(outcomes, ("4.37.0",)))
    monkeypatch.setattr(torch_matrix, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(torch_matrix.shutil, "which", lambda name: name)
    monkeypatch.setattr(matrix, "write_table", lambda *_: None)

    def run(torch: str, *_: object) -> list[matrix.Outcome]:
        return [matrix.Outcome("4.37.0", 3, 1.0, outcomes[torch])]

    monkeypatch.setattr(torch_matrix, "run_torch", run)
    assert torch_matrix.main(["--only", "2.4.0"]) == 0
    assert not torch_matrix.RECORD.exists()
    assert torch_matrix.main([]) == 1
    assert record()["torch"]["2.6.0"] == {"4.37.0": {"tests": 3, "problem": "test_a failure"}}
    assert "| 2.6.0 | 4.37.0 | failed: 4.37.0 |" in torch_matrix.table(record())


def test_without_a_compiler_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """inductor would fail on every version, after gigabytes of downloads."""
    monkeypatch.setattr(torch_matrix.shutil, "which", lambda name: None)
    assert torch_matrix.main([]) == 2
    assert "apt-get install g++" in capsys.readouterr().err
