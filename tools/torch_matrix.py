"""Runs the conformance suite on many torch versions, each with an old and a new transformers, and records the result.

Each version has an environment of its own, 1 to 7 GB, which is deleted once its releases have run. The suite compiles
more here than in the matrix, and with a C++ compiler, so this needs g++.

    python tools/torch_matrix.py               every pair of PAIRS; writes tests/torch_versions.json, docs/supported.md
    python tools/torch_matrix.py --only 2.4.0  these versions of torch alone
"""

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qwen2_fp16_fix.patches.version_map import NEWEST_TESTED  # noqa: E402
from tools import matrix  # noqa: E402
from tools.matrix_environments import Environments  # noqa: E402

RECORD = ROOT / "tests" / "torch_versions.json"
BEGIN, END = "<!-- torch-table:begin -->", "<!-- torch-table:end -->"

#: The releases of transformers for each version of torch: the oldest, and the newest that takes this torch.
PAIRS = {
    "2.4.0": ("4.37.0", "4.57.6"),
    "2.6.0": ("4.37.0", "4.57.6", NEWEST_TESTED),
    **dict.fromkeys(("2.8.0", "2.10.0", "2.11.0", "2.13.0", "2.15.0"), ("4.37.0", NEWEST_TESTED)),
}


def table(record: dict[str, Any]) -> str:
    """The table of torch versions for the handbook."""
    rows = ["| torch | transformers | result |", "| --- | --- | --- |"]
    for torch, outcomes in record["torch"].items():
        failed = [version for version, outcome in outcomes.items() if outcome["problem"]]
        verdict = f"failed: {', '.join(failed)}" if failed else f"{len(outcomes)} of {len(outcomes)} passed"
        rows.append(f"| {torch} | {', '.join(outcomes)} | {verdict} |")
    return "\n".join(rows)


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TORCH", choices=PAIRS, help="these versions of torch alone")
    parser.add_argument("--jobs", type=int, default=2, help="releases at a time (default 2)")
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="where to work (default .matrix)")
    parser.add_argument("--keep", action="store_true", help="keep the environments and the folders of the releases")
    return parser.parse_args(arguments)


def run_torch(torch: str, sources: str, options: argparse.Namespace) -> list[matrix.Outcome]:
    """The outcomes of the releases of one torch version."""
    print(f"torch {torch}")
    listed = {release.version: release for release in matrix.listed()}
    environments = Environments(options.folder.resolve() / "torch", torch, base=torch)
    state = f"{sources} torch {torch} python {platform.python_version()}"

    def run(version: str) -> matrix.Outcome:
        return matrix.run_or_keep(environments, version, state, options, QWEN2_FP16_FIX_COMPILE="1")

    if any(matrix.kept(environments, version, state) is None for version in PAIRS[torch]):
        environments.base()
    outcomes = matrix.run_all([listed[version] for version in PAIRS[torch]], run, options.jobs)
    if not options.keep:
        environments.discard_base()
    return outcomes


def write_record(found: dict[str, list[matrix.Outcome]], sources: str) -> None:
    """Writes tests/torch_versions.json, and the table of the handbook."""
    record = {
        "digest": sources,
        "python": platform.python_version(),
        "torch": {torch: matrix.recorded(outcomes) for torch, outcomes in found.items()},
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    matrix.write_table(table(record), BEGIN, END)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every pair that was asked for passed, 1 if not, 2 without a C++ compiler."""
    options = options_of(arguments)
    if shutil.which("g++") is None:
        print("the suite compiles with inductor here, which needs g++ (Debian: apt-get install g++)", file=sys.stderr)
        return 2
    sources = matrix.digest()
    found = {torch: run_torch(torch, sources, options) for torch in options.only or PAIRS}
    if matrix.digest() != sources:
        print("the patches or the suite have changed during the run: run it again", file=sys.stderr)
        return 1
    if not options.only:
        write_record(found, sources)
    failed = [f"{torch} with {each.version}" for torch, outcomes in found.items() for each in outcomes if each.problem]
    print(f"failed: {', '.join(failed)}" if failed else f"all {sum(map(len, found.values()))} pairs passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
