"""Runs the conformance suite on many transformers releases, and writes down what passed.

Not one environment a release: torch and pytest are installed once, each distinct set of dependencies once (a layer),
and a release is a thin folder that goes before them on PYTHONPATH. What is finished is kept, so a stopped run resumes.

    python tools/matrix.py                 every release listed; writes tests/matrix.json and docs/supported.md
    python tools/matrix.py --ci            one release of each range module; `make test` runs the installed one
    python tools/matrix.py --only 4.57.6   these releases alone
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "tests" / "conformance"
RECORD = ROOT / "tests" / "matrix.json"
PAGE = ROOT / "docs" / "supported.md"  # shows the tables, between marks
BEGIN, END = "<!-- support-table:begin -->", "<!-- support-table:end -->"
TORCH = "2.13.0"
LIMIT = 900  # seconds for one release; a slow machine takes 60

sys.path.insert(0, str(ROOT))
from qwen2_fp16_fix.patches.version_map import RANGES, Range, range_for  # noqa: E402
from tools.matrix_environments import Environments  # noqa: E402
from tools.used_sources import used_by  # noqa: E402


class Release(NamedTuple):
    """A line of releases.json."""

    version: str
    python: str
    ci: bool


class Outcome(NamedTuple):
    """What one release reported. `problem` is empty only where every test of the suite ran and passed."""

    version: str
    tests: int
    seconds: float
    problem: str


def listed() -> list[Release]:
    """The releases of releases.json, oldest first."""
    return [Release(**line) for line in json.loads((ROOT / "tools" / "releases.json").read_text())]


def decisive() -> list[Path]:
    """Every file that the outcome depends on: the patches, the suite, and what of the package it uses."""
    suite = [*SUITE.glob("*.py"), ROOT / "tests" / "conftest.py"]
    return sorted({*(ROOT / "patches").glob("*.py"), *used_by(suite, ROOT)})


def digest() -> str:
    """Of all those files."""
    state = hashlib.sha256()
    for path in decisive():
        state.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
        state.update(path.read_bytes())
    return state.hexdigest()[:16]


def run_suite(environments: Environments, version: str, threads: int, **variables: str) -> Outcome:
    """Installs a release and runs the conformance suite on it, with these environment variables."""
    started = time.monotonic()
    release, layer = environments.release(version)
    report = environments.result(version).with_suffix(".xml")
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    path = os.pathsep.join(map(str, (release, layer)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "QWEN2_"))}
    environment |= {"PYTHONPATH": path, "QWEN2_FP16_FIX_MATRIX": version, "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": str(threads), **variables}
    command = [str(environments.python), "-m", "pytest", str(SUITE), "-q", "-p", "no:cacheprovider"]
    command += ["-o", "filterwarnings=default", f"--junitxml={report}"]  # old releases warn about much in a new torch
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
        status, tail = f"pytest ended with {done.returncode}", done.stdout[-1500:] + done.stderr[-500:]
    except subprocess.TimeoutExpired:
        status, tail = f"no end within {LIMIT} seconds", ""
    tests, problem = read_report(report, suite_functions())
    if status != "pytest ended with 0":  # a report may look whole although the process died after it
        problem = problem or status
    return Outcome(version, tests, round(time.monotonic() - started, 1), problem and f"{problem}\n{tail}")


def suite_functions() -> set[str]:
    """The names of all test functions of the suite."""
    return {name for path in SUITE.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}


def read_report(report: Path, expected: set[str]) -> tuple[int, str]:
    """Number of tests in a JUnit file, and what is wrong with it: nothing only if all of `expected` ran and passed."""
    if not report.exists():
        return 0, "no report"
    cases = list(ET.parse(report).getroot().iter("testcase"))
    bad = [
        f"{c.get('name')} {kind}" for c in cases for kind in ("failure", "error", "skipped") if c.find(kind) is not None
    ]
    absent = expected - {re.sub(r"\[.*", "", c.get("name", "")) for c in cases}
    problems = bad + [f"{name} did not run" for name in sorted(absent)]
    return len(cases), ", ".join(problems)


def kept(environments: Environments, version: str, state: str) -> Outcome | None:
    """The outcome of an earlier run on the same sources, if it passed."""
    path = environments.result(version)
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    outcome = Outcome(**found["outcome"])
    return outcome if found["state"] == state and not outcome.problem else None


def run_all(
    wanted: Sequence[Release],
    run: Callable[[str], Outcome],
    jobs: int,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """An outcome for each of `wanted`, in its order; one that fails to run at all is an outcome too."""
    found: dict[str, Outcome] = {}
    started = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, release.version): release.version for release in wanted}
        for future in as_completed(futures):
            version = futures[future]
            error = future.exception()
            found[version] = future.result() if error is None else Outcome(version, 0, 0.0, f"did not run: {error}")
            left = (time.monotonic() - started) / len(found) * (len(wanted) - len(found))
            outcome = found[version]
            verdict = outcome.problem or "passed"
            say(
                f"{version:>8}  {outcome.tests:3} tests  {outcome.seconds:6.1f} s  {left / 60:5.1f} min left  {verdict}"
            )
    return [found.get(r.version, Outcome(r.version, 0, 0.0, "did not report")) for r in wanted]


def tested_in(each: Range, passed: Iterable[str]) -> list[str]:
    """Those of the releases that a range serves."""
    return [version for version in passed if range_for(version) == each]


def table(record: dict[str, Any]) -> str:
    """The support table, a row for each range of the version map."""
    rows = ["| transformers | patch | releases tested | result |", "| --- | --- | --- | --- |"]
    outcomes: dict[str, Any] = record["releases"]
    for each in RANGES:
        versions = tested_in(each, outcomes)
        failed = [version for version in versions if outcomes[version]["problem"]]
        verdict = f"failed: {', '.join(failed)}" if failed else f"{len(versions)} of {len(versions)} passed"
        rows.append(f"| `{each.requirement}` | `{each.module}` | {', '.join(versions)} | {verdict} |")
    return "\n".join(rows)


def write_table(made: str, begin: str = BEGIN, end: str = END) -> None:
    """Puts a table between its marks in the handbook."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    PAGE.write_text(f"{before}{begin}\n{made}\n{end}{after}", encoding="utf-8")


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ci", action="store_true", help="one of each range module, but the installed one")
    parser.add_argument("--only", nargs="+", metavar="VERSION", help="these releases alone")
    parser.add_argument("--jobs", type=int, default=2, help="releases at a time (default 2)")
    parser.add_argument("--torch", default=TORCH, help=f"torch version for the base environment (default {TORCH})")
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="where to work (default .matrix)")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the releases")
    parser.add_argument("--table", action="store_true", help="print the support table of the last full run and stop")
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace, releases: Sequence[Release]) -> list[Release]:
    """Those asked for that this Python can run; says which are left out."""
    if options.only:
        asked = [release for release in releases if release.version in options.only]
    else:
        tested = importlib.metadata.version("transformers") if options.ci else ""
        asked = [release for release in releases if (release.ci or not options.ci) and release.version != tested]
    here = Version(platform.python_version())
    for release in asked:
        if here not in SpecifierSet(release.python):
            print(f"{release.version:>8}  left out: needs Python {release.python}, this is {here}")
    return [release for release in asked if here in SpecifierSet(release.python)]


def run_or_keep(
    environments: Environments, version: str, state: str, options: argparse.Namespace, **variables: str
) -> Outcome:
    """The outcome of a release: an earlier one on the same sources, or that of a run now. See `run_suite`."""
    outcome = kept(environments, version, state)
    if outcome is None:
        outcome = run_suite(environments, version, max(1, (os.cpu_count() or 1) // options.jobs), **variables)
        found = {"state": state, "outcome": outcome._asdict()}
        environments.result(version).write_text(json.dumps(found, indent=2))
        if not options.keep:
            environments.discard(version)
    return outcome


def recorded(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Outcomes by release, as a record holds them."""
    return {o.version: {"tests": o.tests, "problem": o.problem.partition("\n")[0]} for o in outcomes}


def write_record(outcomes: Sequence[Outcome], sources: str, torch: str) -> None:
    """Writes tests/matrix.json, and the table of the handbook."""
    record = {
        "digest": sources,
        "torch": torch,
        "python": platform.python_version(),
        "releases": recorded(outcomes),
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    write_table(table(record))


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every release that was asked for reported and passed, 1 if not, 2 for a release that is not listed."""
    options = options_of(arguments)
    if options.table:
        print(table(json.loads(RECORD.read_text())))
        return 0
    releases = listed()
    unknown = set(options.only or ()) - {r.version for r in releases}
    if unknown:
        print(f"not in releases.json: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    wanted = chosen(options, releases)
    environments = Environments(options.folder.resolve(), options.torch)
    environments.base()
    sources = digest()
    state = f"{sources} torch {options.torch} python {platform.python_version()}"
    outcomes = run_all(wanted, lambda version: run_or_keep(environments, version, state, options), options.jobs)
    if digest() != sources:
        print("the patches or the suite have changed during the run: run it again", file=sys.stderr)
        return 1
    if not options.ci and not options.only and wanted == releases:
        write_record(outcomes, sources, options.torch)
    failed = [outcome.version for outcome in outcomes if outcome.problem]
    verdict = f"; failed: {', '.join(failed)}" if failed else ""
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} releases passed{verdict}")
    return 1 if failed or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
