"""The wheel and the sdist: the same bits wherever they are built, the whole tree in them, and every way to install it.

No build here fetches anything: hatchling is among the tests' own requirements.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from tests.helpers import ROOT

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("distributions")]  # one worker builds, for all

#: What a checkout has beside its sources, and may be large.
STRAY = (".git", ".venv", ".matrix", ".*_cache", ".hypothesis", "__pycache__", "build", "dist", "*.egg-info", "shared")
#: Prints where the package is. Fails where what lies beside the package in a checkout can be imported from it.
LOOK = """
import importlib.util, pathlib, qwen2_fp16_fix, qwen2_fp16_fix.patches
for name in ("tests", "tools", "benchmarks", "docs", "qwen2_fp16_fix"):
    assert importlib.util.find_spec(f"qwen2_fp16_fix.{name}") is None, name
assert (pathlib.Path(qwen2_fp16_fix.patches.__file__).parent / "modeling_qwen2_fp16.py").is_file()
print(pathlib.Path(qwen2_fp16_fix.__file__).parents[1])
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """What a program prints. It must end well."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**inherited, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout without git."""
    copy = tmp_path_factory.mktemp("project") / "copy"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*STRAY))
    return copy


@pytest.fixture(scope="module")
def elsewhere(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another copy: other times and modes, and files that do not belong to it."""
    copy = tmp_path_factory.mktemp("elsewhere") / "other"
    shutil.copytree(checkout, copy, symlinks=True)
    for path in copy.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o700 if path.is_dir() else 0o600)
            os.utime(path, (1e9, 1e9))
    for stray in (
        "tests/__pycache__/stray.pyc",
        "patches/__pycache__/stray.pyc",
        "qwen2_fp16_fix/.hypothesis/examples/stray",
        "tests/.pytest_cache/stray",
        "qwen2_fp16_fix.egg-info/SOURCES.txt",
        "build/stray.py",
        "notes.md",
    ):
        (copy / stray).parent.mkdir(parents=True, exist_ok=True)
        (copy / stray).write_text("Makefile\n")
    return copy


def build(source: Path, out: Path, umask: int = 0o022) -> Path:
    """`out`, with what `make dist` builds from `source`."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, umask=umask, cwd=out.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel and the sdist of this checkout."""
    return build(ROOT, tmp_path_factory.mktemp("release") / "dist")


@pytest.fixture(scope="module")
def wheel(release: Path) -> Path:
    return next(release.glob("*.whl"))


@pytest.fixture(scope="module")
def unpacked(release: Path) -> Path:
    """The sdist's bare folder."""
    with tarfile.open(next(release.glob("*.tar.gz"))) as archive:
        archive.extractall(release.parent, filter="data")
    return next(release.parent.glob("qwen2_fp16_fix-*"))


def tree() -> set[str]:
    """What a wheel should hold, by path: the package, and patches/ inside it."""
    package = {path for path in (ROOT / "qwen2_fp16_fix").rglob("*") if path.is_file()}
    patches = {ROOT / "qwen2_fp16_fix" / "patches" / path.name for path in (ROOT / "patches").iterdir()}
    paths = {path.relative_to(ROOT).as_posix() for path in package | patches}
    return {path for path in paths if "__pycache__" not in path}


def test_a_release_is_the_same_bits_wherever_it_is_built(release: Path, elsewhere: Path) -> None:
    other = build(elsewhere, elsewhere.parent / "dist", umask=0o077)
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (release, other))
    assert sorted(name.rpartition(".")[2] for name in first) == ["gz", "whl"]
    assert first == second


def test_a_checkout_without_links_builds_the_same_wheel(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    """On Windows git writes a link as a file that names its target, where `core.symlinks` is off."""
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy, symlinks=True)
    (copy / "qwen2_fp16_fix" / "patches").unlink()
    (copy / "qwen2_fp16_fix" / "patches").write_text("../patches")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "dist", copy, cwd=tmp_path)
    assert next((tmp_path / "dist").glob("*.whl")).read_bytes() == wheel.read_bytes()


def test_the_wheel_holds_the_tree(wheel: Path) -> None:
    """A file that the build leaves out is missing only for users."""
    listed = zipfile.ZipFile(wheel).namelist()
    assert len(listed) == len(set(listed))
    assert {name for name in listed if ".dist-info/" not in name} == tree()
    assert any(name.endswith("licenses/LICENSE") for name in listed)


def test_the_sdist_holds_what_a_packager_needs(release: Path) -> None:
    with tarfile.open(next(release.glob("*.tar.gz"))) as archive:
        entries = [entry for entry in archive if entry.isfile()]
        assert len(entries) == len(archive.getnames())  # no links
    names = {entry.name.partition("/")[2] for entry in entries}
    assert len(names) == len(entries)
    wanted = {
        "benchmarks/cost.py",
        "docs/hub.md",
        "docs/index.md",
        "docs/key-centring.md",
        "docs/performance.md",
        "docs/pinning.md",
        "docs/range-proof.md",
        ".github/CONTRIBUTING.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "README.md",
        "README.zh-CN.md",
        "LICENSE",
        "Makefile",
        "docs/conf.py",
        "tools/package_page.py",
        "pyproject.toml",
        "tests/repository/test_distributions.py",
    }
    assert wanted <= names
    assert tree() <= names
    assert {path.replace("qwen2_fp16_fix/patches/", "patches/") for path in tree()} <= names
    assert {entry.mode for entry in entries} <= {0o644, 0o755}
    assert {(entry.uid, entry.gid, entry.uname, entry.gname) for entry in entries} == {(0, 0, "", "")}
    assert len({entry.mtime for entry in entries}) == 1


def test_an_index_takes_the_release(release: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *release.iterdir(), cwd=release)


def test_the_metadata_is_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Requires-Python"] == ">=3.10"
    versions = {f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)}
    assert versions | {"Typing :: Typed"} <= set(metadata.get_all("Classifier") or [])
    assert metadata.get_all("Project-URL") == ["Homepage, https://pypi.org/project/qwen2-fp16-fix/"]
    assert metadata["Description-Content-Type"] == "text/markdown"


class Environment:
    """A Python without this project, beside the packages that run these tests."""

    def __init__(self, folder: Path) -> None:
        import torch

        venv.create(folder, symlinks=True)
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.packages = next((folder / "lib").glob("python*/site-packages"))
        # a line of a .pth file adds a folder to the path, and does not read that folder's .pth files
        (self.packages / "beside.pth").write_text(str(Path(torch.__file__).parents[1]))

    def install(self, *what: object) -> None:
        """Nothing that it requires, and no build requirements: both are there."""
        options = ("-q", "--no-deps", "--no-index", "--no-build-isolation", "--force-reinstall")
        self.pip("install", *options, *what)

    def uninstall(self) -> None:
        self.pip("uninstall", "-q", "-y", "qwen2-fp16-fix")

    def pip(self, *arguments: object) -> None:
        """That of the Python which runs these tests: to install one more took seconds."""
        run(sys.executable, "-m", "pip", "--python", self.python, *arguments, cwd=self.folder)

    def look(self, **environment: str) -> Path:
        """Where the package is; nothing else of the checkout is found in it."""
        return Path(run(self.python, "-c", LOOK, cwd=self.folder, **environment).strip())


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment") / "env")


def test_the_wheel_runs(environment: Environment, wheel: Path) -> None:
    environment.install(wheel)
    assert environment.look() == environment.packages
    said = run(environment.folder / "bin" / "qwen2-fp16-fix", "demo", cwd=environment.folder)
    environment.uninstall()
    assert "!!!!!!!!" in said


def test_the_sdist_installs(environment: Environment, release: Path) -> None:
    environment.install(next(release.glob("*.tar.gz")))
    assert environment.look() == environment.packages
    environment.uninstall()


def test_the_unpacked_sdist_runs_as_it_is(environment: Environment, unpacked: Path) -> None:
    """Packagers test so."""
    assert environment.look(PYTHONPATH=str(unpacked)) == unpacked
    command = (environment.python, "-m", "qwen2_fp16_fix", "demo")
    assert "!!!!!!!!" in run(*command, cwd=environment.folder, PYTHONPATH=str(unpacked))


def test_an_editable_install_reads_the_checkout(environment: Environment, checkout: Path) -> None:
    environment.install("-e", checkout)
    assert environment.look() == checkout
    assert not (environment.packages / "qwen2_fp16_fix").exists()  # a copy that no edit would reach
    environment.uninstall()


def test_a_bare_checkout_imports(environment: Environment, checkout: Path) -> None:
    assert environment.look(PYTHONPATH=str(checkout)) == checkout
