"""The matrix: which releases it lists, what it lets pass, and whether its record is up to date."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from qwen2_fp16_fix.patches.version_map import NEWEST_TESTED, RANGES
from tools import matrix
from tools.matrix_environments import Environments, core_requirements

LISTED = matrix.listed()
VERSIONS = [release.version for release in LISTED]

#: The releases on both sides of each change of Qwen2's source, and of the span in which register() does nothing.
ENDS = {
    *("4.37.0", "4.41.2", "4.42.0", "4.44.2", "4.45.0", "4.47.1", "4.48.0", "4.52.4", "4.53.0", "4.53.3", "4.54.0"),
    *("4.55.4", "4.56.0", "4.57.6", "5.0.0", "5.1.0", "5.2.0", "5.3.0", "5.4.0", "5.22.2", "5.23.0", "5.24.0"),
    *("5.13.0", "5.18.0"),
}


def test_enough_releases_are_listed() -> None:
    assert len(set(VERSIONS)) == len(VERSIONS) >= 45
    assert set(VERSIONS) >= ENDS
    minors = {tuple(Version(v).release[:2]) for v in VERSIONS}
    assert {(4, m) for m in range(37, 58)} | {(5, m) for m in range(25)} == minors
    assert max(map(Version, VERSIONS)) == Version(NEWEST_TESTED)


def test_one_release_of_every_range_module_runs_in_ci_and_the_newest() -> None:
    """The other releases are in the record, which goes stale with every file that decides their outcome."""
    in_ci = [release for release in LISTED if release.ci]
    served = [matrix.range_for(release.version).module for release in in_ci]
    assert sorted(served) == sorted(each.module for each in RANGES)
    assert NEWEST_TESTED in {release.version for release in in_ci}


def test_ci_leaves_the_installed_release_to_make_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make test` runs the same suite on it. A full run leaves out none."""
    monkeypatch.setattr(matrix.importlib.metadata, "version", lambda name: NEWEST_TESTED)
    in_ci = matrix.chosen(matrix.options_of(["--ci"]), LISTED)
    assert {release.version for release in LISTED if release.ci} - {NEWEST_TESTED} == {each.version for each in in_ci}
    assert NEWEST_TESTED in {release.version for release in matrix.chosen(matrix.options_of([]), LISTED)}


def test_each_release_is_in_exactly_one_range() -> None:
    for version in VERSIONS:
        assert sum(Version(version) in SpecifierSet(each.requirement) for each in RANGES) == 1


def test_the_record_is_up_to_date_and_all_passed() -> None:
    """The support table claims what ran; a change of the patches takes the claim away until `make matrix` ran again."""
    record = json.loads(matrix.RECORD.read_text())
    assert record["digest"] == matrix.digest(), "the patches or the suite have changed: run `make matrix`"
    assert list(record["releases"]) == VERSIONS
    assert {v: o["problem"] for v, o in record["releases"].items() if o["problem"]} == {}
    assert all(o["tests"] >= len(matrix.suite_functions()) for o in record["releases"].values())


def test_the_page_shows_the_record() -> None:
    shown = matrix.PAGE.read_text(encoding="utf-8").partition(matrix.BEGIN)[2].partition(matrix.END)[0]
    assert shown.strip() == matrix.table(json.loads(matrix.RECORD.read_text())), "run `make matrix`"


def test_the_pages_say_which_versions() -> None:
    """The README promised `make test` on 3.10, where the release it installs cannot be had."""
    record = json.loads(matrix.RECORD.read_text())
    oldest = {release.version: min(SpecifierSet(release.python), key=str).version for release in LISTED}
    newest_on_310 = max((v for v in VERSIONS if Version(oldest[v]) < Version("3.11")), key=Version)
    before = matrix.PAGE.read_text(encoding="utf-8").partition(matrix.BEGIN)[0]
    for said in ("Python 3.10", newest_on_310, record["python"], record["torch"].removesuffix(".0")):
        assert said in before
    for name in ("README.md", "README.zh-CN.md"):
        text = (matrix.ROOT / name).read_text(encoding="utf-8")
        assert f"Python {oldest[NEWEST_TESTED].removesuffix('.0')}" in text
        assert f"[{len(record['releases'])} " in text


def report(tmp_path: Path, *cases: str) -> Path:
    path = tmp_path / "report.xml"
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return path


PASSED = '<testcase name="test_a[eager]"/><testcase name="test_b"/>'


def test_a_report_passes_only_whole(tmp_path: Path) -> None:
    assert matrix.read_report(report(tmp_path, PASSED), {"test_a", "test_b"}) == (2, "")


@pytest.mark.parametrize("kind", ["failure", "error", "skipped"])
def test_a_test_that_did_not_pass_is_a_problem(tmp_path: Path, kind: str) -> None:
    """A skip as well: it would hide what a release lacks."""
    bad = f'<testcase name="test_c"><{kind}/></testcase>'
    assert matrix.read_report(report(tmp_path, PASSED, bad), {"test_a"}) == (3, f"test_c {kind}")


def test_a_test_that_did_not_run_is_a_problem(tmp_path: Path) -> None:
    assert "test_gone did not run" in matrix.read_report(report(tmp_path, PASSED), {"test_gone"})[1]
    assert matrix.read_report(tmp_path / "absent.xml", set()) == (0, "no report")


def test_a_whole_report_does_not_excuse_a_dead_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash after the report is written, on the way out of the interpreter, is a finding too."""
    environments = Environments(tmp_path, "2.13.0")
    monkeypatch.setattr(environments, "release", lambda version: (tmp_path, tmp_path))
    monkeypatch.setattr(matrix, "suite_functions", lambda: {"test_a", "test_b"})
    for status, problem in ((0, ""), (-11, "pytest ended with -11")):

        def pytest_run(command: list[str], status: int = status, **_: object) -> subprocess.CompletedProcess[str]:
            Path(command[-1].partition("=")[2]).write_text(f"<testsuite>{PASSED}</testsuite>")
            return subprocess.CompletedProcess(command, status, "", "")

        monkeypatch.setattr(subprocess, "run", pytest_run)
        assert matrix.run_suite(environments, "4.37.0", threads=1).problem.partition("\n")[0] == problem


def test_a_release_that_does_not_report_fails_the_run() -> None:
    def run(version: str) -> matrix.Outcome:
        if version == VERSIONS[1]:
            raise OSError("no space left on device")
        return matrix.Outcome(version, 2, 1.0, "")

    said: list[str] = []
    outcomes = matrix.run_all(LISTED[:3], run, jobs=2, say=said.append)
    assert [outcome.version for outcome in outcomes] == VERSIONS[:3]
    assert [bool(outcome.problem) for outcome in outcomes] == [False, True, False]
    assert any("no space left" in line for line in said)


def test_an_earlier_result_counts_only_on_the_same_sources(tmp_path: Path) -> None:
    environments = Environments(tmp_path, "2.13.0")
    (tmp_path / "results").mkdir()
    for problem, state, counts in (("", "now", True), ("", "before", False), ("test_a failure", "now", False)):
        outcome = matrix.Outcome("4.37.0", 2, 1.0, problem)
        environments.result("4.37.0").write_text(json.dumps({"state": state, "outcome": outcome._asdict()}))
        assert (matrix.kept(environments, "4.37.0", "now") == outcome) == counts


def test_requirements_of_extras_are_left_out() -> None:
    """`transformers[torch]` of 4.52 would install a torch below 2.7."""
    metadata = 'Requires-Dist: numpy>=1.17\nRequires-Dist: torch<2.7; extra == "torch"\n'
    assert core_requirements(metadata) == ["numpy>=1.17"]


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the checkout that `digest` looks at."""
    for folder in ("patches", "qwen2_fp16_fix", "tests", "tools", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "demo_checkpoint", "results")
        shutil.copytree(matrix.ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignored)
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "SUITE", tmp_path / "tests" / "conformance")
    return tmp_path


#: Something of everything that the suite goes through: the arithmetic, ways in, an export's files, a program's start.
USED = (
    "patches/blocks.py",
    "patches/v4_37.py",
    "qwen2_fp16_fix/__init__.py",
    "qwen2_fp16_fix/code_copies.py",
    "qwen2_fp16_fix/errors.py",
    "qwen2_fp16_fix/files/folders.py",
    "qwen2_fp16_fix/files/writing.py",
    "qwen2_fp16_fix/hub/export.py",
    "qwen2_fp16_fix/hub/export_config.py",
    "qwen2_fp16_fix/hub/model_card.py",
    "qwen2_fp16_fix/in_place.py",
    "qwen2_fp16_fix/launch/launcher.py",
    "qwen2_fp16_fix/launch/startup/sitecustomize.py",
    "qwen2_fp16_fix/locking.py",
    "qwen2_fp16_fix/model_status.py",
    "qwen2_fp16_fix/registration/construction.py",
    "qwen2_fp16_fix/registration/register.py",
    "tests/conformance/conftest.py",
    "tests/conformance/load_remotely.py",
    "tests/conftest.py",
    "tests/helpers.py",
    "tests/stress/models.py",
)


def test_the_digest_sees_what_decides_the_outcome(copied: Path) -> None:
    """A patch, what applies it or the suite changed after the run, and the table went on claiming it.

    The list of these files was written by hand once and forgot five that `export` uses.
    """
    before = matrix.digest()
    assert re.fullmatch(r"[0-9a-f]{16}", before)
    seen = {path.relative_to(copied).as_posix() for path in matrix.decisive()}
    assert set(USED) <= seen
    assert any(name.startswith("qwen2_fp16_fix/checkpoints/") for name in seen)  # `export` looks at the weights
    for name in ("patches/blocks.py", "qwen2_fp16_fix/hub/model_card.py", "tests/stress/models.py"):
        (copied / name).write_bytes((copied / name).read_bytes() + b"#")
        after = matrix.digest()
        assert after != before, name
        before = after


def test_the_digest_does_not_see_the_rest(copied: Path) -> None:
    """Or a word in a report would ask for the whole matrix anew."""
    seen = {path.relative_to(copied).parts[:2] for path in matrix.decisive()}
    for room in ("report", "cli", "diagnosis", "scanning", "demo.py"):
        assert ("qwen2_fp16_fix", room) not in seen
    verification = {path.name for path in matrix.decisive() if path.parent.name == "verification"}
    assert verification == {"__init__.py", "saved.py"}  # the model card of an export reads a saved verification
    before = matrix.digest()
    for name in ("qwen2_fp16_fix/report/page.py", "qwen2_fp16_fix/demo.py", "benchmarks/cost.py"):
        (copied / name).write_bytes((copied / name).read_bytes() + b"#")
    assert matrix.digest() == before


def test_an_unlisted_release_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix.main(["--only", "1.0"]) == 2
    assert "not in releases.json: 1.0" in capsys.readouterr().err
