"""The package as a package: its public names, its documents, its wheel."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest
import typer.main

import qwen2_fp16_fix
from qwen2_fp16_fix.cli import commands as cli
from qwen2_fp16_fix.patches import version_map

pytestmark = pytest.mark.xdist_group("project")  # one worker builds the wheel, for all

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.zh-CN.md")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PROMISED = {
    "register", "unregister", "registered", "stock_models", "fix", "unfix", "adopt_cache", "status", "is_fixed",
    "certify", "verify", "scan", "doctor", "export", "push", "lock", "check",
    "Qwen2Model", "Qwen2ForCausalLM", "Qwen2ForSequenceClassification",
    "Qwen2ForTokenClassification", "Qwen2ForQuestionAnswering",
    "Qwen2FP16FixError", "UnsupportedTransformersError", "NotQwen2Error", "PatchConflictError", "MetaTensorError",
    "ForeignCacheError", "HalfPrecisionScoresError", "RegistrationError", "ShardedRangeError", "CheckpointError",
    "VerificationError", "ExportError", "PublishError", "LockError", "LockFileError", "ScanError",
    "UntestedTransformersWarning", "StalePlanWarning", "NotFixedWarning",
    "__version__",
}  # fmt: skip


def test_public_names_are_there_and_documented() -> None:
    """`__all__` is the interface: each name resolves, says what it does, and no other public name slips in."""
    assert sorted(qwen2_fp16_fix.__all__) == sorted(PROMISED)
    for name in qwen2_fp16_fix.__all__:
        thing = getattr(qwen2_fp16_fix, name)
        assert name == "__version__" or thing.__doc__
    with pytest.raises(AttributeError, match="no_such_name"):
        qwen2_fp16_fix.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", sorted(name for name in PROMISED if name.islower() and name != "__version__"))
def test_docstrings_say_what_each_parameter_is(name: str) -> None:
    """`device`, `progress`, `api` and others stood in signatures alone, which is all that the API page then shows."""
    function = getattr(qwen2_fp16_fix, name)
    words = set(re.findall(r"\w+", function.__doc__ or ""))
    assert set(inspect.signature(function).parameters) <= words


def test_public_names_are_the_types_a_checker_sees() -> None:
    """The names are found lazily at run time and by import statements under TYPE_CHECKING: the two must agree."""
    source = read("qwen2_fp16_fix/__init__.py")
    block = source[source.index("if TYPE_CHECKING:") : source.index("__all__")]
    imported = set(re.findall(r"^ {8}(\w+),$", block, re.M))
    imported |= {name for line in re.findall(r"import ([\w, ]+)$", block, re.M) for name in line.split(", ")}
    assert imported == set(qwen2_fp16_fix.__all__) - {"__version__"}
    assert (ROOT / "qwen2_fp16_fix" / "py.typed").is_file()


def test_importing_the_package_imports_neither_torch_nor_transformers(python: Callable[..., Any]) -> None:
    done = python("-c", "import qwen2_fp16_fix, sys; print({'torch', 'transformers'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr


def test_versions_agree() -> None:
    version = re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.M)
    assert version is not None
    newest = re.search(r"^## \[(.+)\] - \d{4}-\d\d-\d\d$", read("CHANGELOG.md"), re.M)
    assert newest is not None
    assert version[1] == newest[1] == qwen2_fp16_fix.__version__
    assert f"qwen2-fp16-fix=={version[1]}" in read("README.md")


@pytest.mark.parametrize("readme", READMES)
def test_readmes_name_every_way_in_and_every_command(readme: str) -> None:
    text = read(readme)
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for command, implementation in commands.items():
        assert f"qwen2-fp16-fix {command}" in text
        assert implementation.help
    for name in ("register()", "unregister()", "registered()", "fix(model)", "unfix(model)", "status(model)"):
        assert name in text
    for target in ("demo", "test", "matrix", "bench", "docs", "dist"):
        assert f"make {target}" in text
    for other in ("qwen2_fp16_fix.auto", "QWEN2_FP16_FIX=0"):
        assert other in text
    assert version_map.NEWEST_TESTED in text


def test_readmes_show_the_same_code() -> None:
    def code(text: str) -> list[str]:
        blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
        return [re.sub(r"\s*#.*", "", block) for block in blocks]

    assert code(read(READMES[0])) == code(read(READMES[1]))


@pytest.mark.parametrize("readme", READMES)
def test_readmes_say_where_each_name_is(readme: str) -> None:
    """The source map must not name a file that has moved, and both languages have one."""
    text = read(readme)
    named = re.findall(r"`(\w+\.py)`", text)
    functions = {name for name in PROMISED if name.islower()} - {"__version__"}
    assert {Path(name).stem for name in named} >= {qwen2_fp16_fix._HOME[name].rpartition(".")[2] for name in functions}
    assert all((ROOT / "patches" / name).is_file() or (ROOT / "qwen2_fp16_fix" / name).is_file() for name in named)


def test_readmes_figures_are_the_demos() -> None:
    """The table is measured, not remembered: the checkpoint's own record has the stock rows."""
    import json

    record = json.loads(read("qwen2_fp16_fix/demo_checkpoint/TRAINING.json"))
    stock = record["stock_perplexity"]["demo"]
    for readme in READMES:
        text = read(readme)
        for row in ("float32 eager", "bfloat16 eager", "bfloat16 sdpa"):
            assert f"{stock[row]:.3f}" in text
        assert f"{record['peaks']['scores']:,.0f}" in text
        assert f"{record['peaks']['residual']:,.0f}" in text


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist, built as a release would be."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def tree() -> set[str]:
    """What a wheel should hold, by path: the package, and patches/ inside it."""
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "qwen2_fp16_fix").rglob("*") if p.is_file()}
    patches = {f"qwen2_fp16_fix/patches/{p.name}" for p in (ROOT / "patches").iterdir() if p.is_file()}
    return {path for path in package | patches if "__pycache__" not in path}


def test_the_wheel_holds_the_tree(distributions: tuple[Path, Path]) -> None:
    """A file that package-data forgets is missing only for users."""
    names = set(zipfile.ZipFile(distributions[0]).namelist())
    assert {name for name in names if ".dist-info/" not in name} == tree()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_a_packager_needs(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "benchmarks/cost.py",
        "docs/hub.md",
        "docs/index.md",
        "docs/key-centring.md",
        "docs/performance.md",
        "docs/pinning.md",
        "docs/range-proof.md",
        "CHANGELOG.md",
        "README.md",
        "README.zh-CN.md",
        "LICENSE",
        "Makefile",
        "mkdocs.yml",
        "tests/test_project.py",
    }
    assert wanted <= names
    assert {path.replace("qwen2_fp16_fix/patches/", "patches/") for path in tree()} <= names


def test_the_wheel_runs_outside_the_checkout(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """The wheel in an environment of its own, beside this one's torch; the checkout is out of reach."""
    venv.create(tmp_path / "env", with_pip=True, symlinks=True)
    interpreter = tmp_path / "env" / "bin" / "python"
    install = [str(interpreter), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(distributions[0])]
    subprocess.run(install, check=True, cwd=tmp_path)
    own = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    import torch

    (own / "beside.pth").write_text(str(Path(torch.__file__).parents[1]))  # a path line: its .pth files are not read
    where = "import qwen2_fp16_fix, qwen2_fp16_fix.patches as p; print(qwen2_fp16_fix.__file__); print(p.__file__)"
    found = subprocess.run([str(interpreter), "-c", where], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert all(line.startswith(str(own)) for line in found.stdout.split())
    command = tmp_path / "env" / "bin" / "qwen2-fp16-fix"
    done = subprocess.run([str(command), "demo"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "!!!!!!!!" in done.stdout


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What `make dist` builds here, and in a copy without git whose files have other times and modes."""
    folder = tmp_path_factory.mktemp("releases")
    copy = folder / "copy"
    for name in make_dist.sources():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
        (copy / name).chmod(0o777)
        os.utime(copy / name, (1e9, 1e9))
    (copy / "tests" / "__pycache__").mkdir()
    (copy / "tests" / "__pycache__" / "stray.txt").touch()
    (copy / "qwen2_fp16_fix.egg-info").mkdir()
    (copy / "qwen2_fp16_fix.egg-info" / "SOURCES.txt").write_text("Makefile\n")
    for root, mask in ((ROOT, 0o022), (copy, 0o077)):
        command = [sys.executable, str(root / "tools" / "make_dist.py"), str(folder / f"{mask:o}")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, umask=mask, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return [folder / "22", folder / "77"]


def test_a_release_is_the_same_bits_wherever_it_is_built(releases: list[Path]) -> None:
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in releases)
    assert sorted(name.rpartition(".")[2] for name in first) == ["gz", "whl"]
    assert first == second


def test_a_release_is_what_build_makes(releases: list[Path], distributions: tuple[Path, Path]) -> None:
    """Nothing but times, owners, modes and order is normalised away."""
    wheel, sdist = next(releases[0].glob("*.whl")), next(releases[0].glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(distributions[0]) as plain:
        generated = {name for name in ours.namelist() if name.endswith((".dist-info/RECORD", ".dist-info/WHEEL"))}
        assert set(ours.namelist()) == set(plain.namelist())
        assert all(ours.read(name) == plain.read(name) for name in set(ours.namelist()) - generated)
    with tarfile.open(sdist) as ours, tarfile.open(distributions[1]) as plain:
        assert {entry.mode for entry in ours if entry.isfile()} == {0o644}
        assert {(entry.uid, entry.gid, entry.uname, entry.gname) for entry in ours} == {(0, 0, "", "")}
        assert len({entry.mtime for entry in ours}) == 1
        assert set(ours.getnames()) <= set(plain.getnames())  # plain also has strays of this checkout


def test_an_index_takes_the_release(releases: list[Path]) -> None:
    files = [str(path) for path in releases[0].iterdir()]
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_metadata_is_complete(releases: list[Path]) -> None:
    with zipfile.ZipFile(next(releases[0].glob("*.whl"))) as archive:
        name = next(name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Requires-Python"] == ">=3.10"
    versions = {f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)}
    assert versions | {"Typing :: Typed"} <= set(metadata.get_all("Classifier") or [])
    assert [url.partition(", ")[0] for url in metadata.get_all("Project-URL") or []] == ["Homepage"]
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_the_tests_run_on_the_newest_tested_release() -> None:
    assert f'"transformers=={version_map.NEWEST_TESTED}"' in (ROOT / "pyproject.toml").read_text()
