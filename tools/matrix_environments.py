"""Where the matrix runs: one environment with torch and pytest, and thin folders that go before it on PYTHONPATH."""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement


class Environments:
    """The folder with the base environment, the layers, the releases and the results."""

    def __init__(self, folder: Path, torch: str, base: str = "base") -> None:
        """folder: made if missing. torch: the version to install into the base environment, whose folder is `base`."""
        self.folder, self.torch, self.place = folder, torch, folder / base
        self.results = folder / "results" if base == "base" else folder / "results" / base
        self.python = self.place / ("Scripts" if os.name == "nt" else "bin") / "python"
        self.lock = threading.Lock()

    def base(self) -> None:
        """An environment with torch and pytest and nothing else that transformers could pick up."""
        mark = self.place / f"torch-{self.torch}"
        if not mark.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.place)], check=True)
            self._pip(f"torch=={self.torch}")
            self._pip("pytest>=8", "packaging")
            mark.touch()

    def release(self, version: str) -> tuple[Path, Path]:
        """The folder of a release and the folder of its dependencies."""
        release = self.folder / "releases" / version
        self._install(release, "--no-deps", f"transformers=={version}")
        metadata = next(release.glob("transformers-*.dist-info/METADATA")).read_text(encoding="utf-8")
        required = core_requirements(metadata)
        layer = self.folder / "layers" / hashlib.sha256("\n".join(required).encode()).hexdigest()[:12]
        with self.lock:  # two releases may need the same layer
            self._install(layer, *required)
        return release, layer

    def discard(self, version: str) -> None:
        """Deletes the folder of a release."""
        shutil.rmtree(self.folder / "releases" / version, ignore_errors=True)

    def discard_base(self) -> None:
        """Deletes the base environment."""
        shutil.rmtree(self.place, ignore_errors=True)

    def result(self, version: str) -> Path:
        """Where the outcome of a release is kept."""
        return self.results / f"{version}.json"

    def _install(self, target: Path, *what: str) -> None:
        if not (target / ".complete").exists():
            shutil.rmtree(target, ignore_errors=True)
            self._pip("--no-compile", "--target", str(target), *what)
            (target / ".complete").touch()

    def _pip(self, *arguments: str) -> None:
        command = [str(self.python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip install {' '.join(arguments)}: {done.stderr.strip()[-500:]}")


def core_requirements(metadata: str) -> list[str]:
    """What a release requires without any extra, from its METADATA file."""
    lines = HeaderParser().parsestr(metadata).get_all("Requires-Dist") or []
    needed = [Requirement(line) for line in lines]
    return sorted(str(r) for r in needed if r.marker is None or r.marker.evaluate({"extra": ""}))
