"""Builds the wheel and the sdist of a release, the same bits wherever and whenever they are built.

What would differ is taken away: times (all are the date of the newest release in CHANGELOG.md), owners, modes, the
order of files, what lies in the checkout without belonging to it, and the version of the build backend.

    python tools/make_dist.py [FOLDER]    into dist/ by default
"""

import argparse
import gzip
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import build
import build.env

ROOT = Path(__file__).resolve().parents[1]
BACKEND = "setuptools==84.2.1"  # it writes its version into the wheel
NOT_SOURCES = {"build", "dist", "__pycache__"}


def release_time(changelog: str) -> int:
    """Seconds of the epoch at the start of the newest release's day, UTC."""
    found = re.search(r"^## \[.+\] - (\d{4}-\d\d-\d\d)$", changelog, re.M)
    if found is None:
        raise SystemExit("CHANGELOG.md has no release with a date: add `## [VERSION] - YYYY-MM-DD`.")
    return int(datetime.fromisoformat(found[1]).replace(tzinfo=timezone.utc).timestamp())


def sources() -> Iterator[Path]:
    """The files of the checkout, relative: those that git knows or would add, or all where there is no git."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
        yield from (Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file())
        return
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [
            name for name in inner if name not in NOT_SOURCES and not name.startswith(".") and "egg-info" not in name
        ]
        yield from (Path(folder, name).relative_to(ROOT) for name in names)


def stage(folder: Path) -> None:
    """Copies the sources into `folder`."""
    for name in sources():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)


def normalise(sdist: Path, out: Path, time: int) -> Path:
    """Writes the sdist anew into `out`, sorted and without owners, times of its own or a name in its gzip header."""
    target = out / sdist.name
    with (
        tarfile.open(sdist) as read,
        target.open("wb") as raw,
        gzip.GzipFile("", "wb", 9, raw, mtime=time) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as write,
    ):
        for entry in sorted(read.getmembers(), key=lambda member: member.name):
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime, entry.pax_headers = time, {}
            write.addfile(entry, read.extractfile(entry) if entry.isfile() else None)
    return target


def build_all(out: Path) -> list[Path]:
    """The sdist and, from it, the wheel."""
    time = release_time((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    os.environ["SOURCE_DATE_EPOCH"] = str(time)
    os.umask(0o022)  # a wheel keeps the modes of its files
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, build.env.DefaultIsolatedEnv() as environment:
        environment.install({BACKEND})
        tree, loose, unpacked = (Path(temporary, name) for name in ("tree", "loose", "unpacked"))
        stage(tree)
        made = build.ProjectBuilder.from_isolated_env(environment, tree).build("sdist", loose)
        sdist = normalise(Path(made), out, time)
        with tarfile.open(sdist) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # a Python before 3.11.4 knows none
            archive.extractall(unpacked)
        source = next(unpacked.iterdir())
        wheel = build.ProjectBuilder.from_isolated_env(environment, source).build("wheel", out)
    return [sdist, Path(wheel)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds, and prints what it has written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "dist", help="where to write (default dist)")
    for path in build_all(parser.parse_args(arguments).folder.resolve()):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
