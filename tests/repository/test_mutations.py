"""Takes each upcast, cast and mask widening out of the patches, one at a time, and sees a named test turn red.

The last test holds the list against the source: an upcast that nothing here removes is one that nothing guards.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.repository.mutations import MUTATIONS, Mutation, misplaced


def test_every_mutation_is_in_its_place() -> None:
    """All of them in one message: after a rename one wants to know every line, not the first."""
    wrong = misplaced(MUTATIONS, ROOT)
    assert not wrong, "\n" + "\n".join(wrong)


def test_misplaced_mutations_are_named(tmp_path: Path) -> None:
    """A line that is gone, one that is there twice, a file and a test that have moved, a name given twice."""
    (tmp_path / "a.py").write_text("x = 1\ny = 2\ny = 2\ndef test_x(): ...\n")
    there = Mutation("there", "a.py", "x = 1", "", "a.py::test_x[1]")
    cases = (
        (there, []),
        (there._replace(old="x = 2"), ["there: 'x = 2' is not found exactly once in a.py, but 0 times"]),
        (there._replace(old="y = 2"), ["there: 'y = 2' is not found exactly once in a.py, but 2 times"]),
        (there._replace(file="b.py"), ["there: there is no b.py"]),
        (there._replace(red="a.py::test_y"), ["there: a.py defines no test_y"]),
        (there._replace(red="b.py::test_x"), ["there: there is no b.py"]),
    )
    for mutation, said in cases:
        assert misplaced([mutation], tmp_path) == said
    assert misplaced([there, there], tmp_path) == ["there: 2 mutations have this name"]


UNUSED = ("-W", "ignore::pytest.PytestUnknownMarkWarning", "--tb=native")  # xdist's marks; pytest's long tracebacks
#: What another worker is about to compile, and the tests of the repository.
LEFT_OUT = shutil.ignore_patterns("*.pyc.*", "repository")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a mutated run needs. The package finds the copy's patches/ through its link.

    With what Python and pytest have compiled. They compile a file anew if its time has changed, as a mutation's has.
    """
    copy = tmp_path_factory.mktemp("sources")
    for folder in ("patches", "qwen2_fp16_fix", "tools", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=LEFT_OUT)
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=LEFT_OUT)
    shutil.copy(ROOT / "pyproject.toml", copy)
    assert (copy / "qwen2_fp16_fix" / "patches").resolve() == (copy / "patches").resolve()
    return copy


@pytest.fixture(scope="module")
def run_pytest(sources: Path) -> Iterator[Callable[[str], tuple[int, str]]]:
    """Runs a test of the copy; returns pytest's exit code and what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(sources)  # before any checkout that is installed
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # half of a run went into plugins, which no test here needs
    command = [sys.executable, str(ROOT / "tests" / "repository" / "forked_pytest.py")]
    output = sources / "output.txt"
    with subprocess.Popen(
        command, cwd=sources, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(test: str) -> tuple[int, str]:
            arguments = ["-q", "-x", "-p", "no:cacheprovider", *UNUSED, test]
            print(json.dumps({"arguments": arguments, "output": str(output)}), file=server.stdin, flush=True)
            return int(server.stdout.readline()), output.read_text()

        yield run
        server.stdin.close()


@pytest.mark.process
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_turns_red(mutation: Mutation, sources: Path, run_pytest: Callable[[str], tuple[int, str]]) -> None:
    """The named test fails on the mutated source, and for an assertion or an error of the run, not of the copy."""
    assert not misplaced([mutation], ROOT)
    path = sources / mutation.file
    original = path.read_text()
    path.write_text(original.replace(mutation.old, mutation.new))
    try:
        code, printed = run_pytest(mutation.red)
    finally:
        path.write_text(original)
    assert code == 1, printed  # 1: a test failed; 2 to 5: pytest could not run it
    assert "1 failed" in printed


GUARDED = re.compile(r"\.float\(\)|\.to\((?!(?:\w+\.)?device\b)|masked_fill|enabled=False|dtype=torch\.float32")


def test_every_upcast_has_a_mutation() -> None:
    """A cast that no mutation touches could be lost in a refactoring, as Phi-2's and GPT-2's were."""
    unguarded = []
    for path in sorted((ROOT / "patches").glob("*.py")):
        name, text = f"patches/{path.name}", path.read_text()
        spans = [(text.index(m.old), text.index(m.old) + len(m.old)) for m in MUTATIONS if m.file == name]
        for found in GUARDED.finditer(text):
            line = text[text.rfind("\n", 0, found.start()) + 1 : text.find("\n", found.start())]
            in_prose = line.count("`") or line.lstrip().startswith(("#", '"""'))
            if not in_prose and not any(start <= found.start() < end for start, end in spans):
                unguarded.append(f"{name}: {line.strip()}")
    assert not unguarded
