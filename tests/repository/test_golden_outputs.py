"""The numerics version stands for the arithmetic that is recorded."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

import qwen2_fp16_fix as q
from qwen2_fp16_fix.patches import version_map
from tools import golden_outputs

ROOT = Path(__file__).parents[2]
RECORD = json.loads(golden_outputs.RECORD.read_text())


def test_the_numerics_are_those_that_were_recorded() -> None:
    """Fails for whoever changes the arithmetic and does not say so."""
    found = golden_outputs.changes(RECORD, golden_outputs.current())
    assert not found, f"{'; '.join(found)}. {golden_outputs.WHAT_TO_DO}"
    assert RECORD["numerics"] == version_map.NUMERICS, golden_outputs.WHAT_TO_DO


def test_no_order_of_summation_changes_a_recorded_output() -> None:
    """What makes the digests good on any machine: every intermediate is exact, so no order can matter."""
    forwards, backwards = golden_outputs.outputs(), golden_outputs.outputs(backwards=True)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


def norm_rounded_twice(hidden: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    return weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)).to(out_dtype)


def rotation_in_float16(states: Tensor, cos: Tensor, sin: Tensor, shift: Tensor | None = None) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    turned = states * cos.half() + torch.cat((-second, first), dim=-1) * sin.half()
    return turned.float() if shift is None else turned.float() + shift


def product_before_its_scale(zero: Tensor, gate: Tensor, up: Tensor, exponent: int) -> Tensor:
    return gate * up * 2.0**-exponent


@pytest.mark.parametrize(
    ("name", "other", "shows_in"),
    [
        ("rms_norm", norm_rounded_twice, {"rms_norm"}),
        ("rotate", rotation_in_float16, {"rotate", "rotate and shift", "rotate and shift, rounded"}),
        ("scaled_product", product_before_its_scale, {"scaled_product"}),
    ],
)
def test_other_arithmetic_shows_in_the_outputs(
    name: str, other: Any, shows_in: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stock does in its place must not give the recorded bits, or the record would stand for both."""
    monkeypatch.setattr(golden_outputs.numerics, name, other)
    found = golden_outputs.changes(RECORD, {**RECORD, "outputs": golden_outputs.current()["outputs"]})
    assert set(found) == {f"the output of {output} has changed" for output in shows_in}


def test_a_changed_output_is_not_recorded_under_the_old_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "numerics.json"
    outputs = {**RECORD["outputs"], "rms_norm": "0" * 64}
    record.write_text(json.dumps({**RECORD, "outputs": outputs}))
    monkeypatch.setattr(golden_outputs, "RECORD", record)
    assert golden_outputs.main() == 1
    assert f"the output of rms_norm has changed under numerics {version_map.NUMERICS}" in capsys.readouterr().out
    assert json.loads(record.read_text())["outputs"] == outputs
    monkeypatch.setattr(golden_outputs, "NUMERICS", RECORD["numerics"] + 1)
    assert golden_outputs.main() == 0
    assert json.loads(record.read_text()) == {**golden_outputs.current(), "numerics": RECORD["numerics"] + 1}


def releases(changelog: str) -> list[tuple[Version, int]]:
    """Version and numerics of every release, newest first. Fails for a release that does not name its numerics."""
    found = []
    for section in re.split(r"^## ", changelog, flags=re.M)[1:]:
        heading = re.match(r"\[(\d[^\]]*)\]", section)
        if heading:
            number = re.search(r"^Numerics: (\d+)$", section, re.M)
            assert number, f"CHANGELOG.md does not name the numerics of {heading[1]}: add `Numerics: N`."
            found.append((Version(heading[1]), int(number[1])))
    return found


def unannounced(found: list[tuple[Version, int]]) -> list[str]:
    """Releases that changed the numerics without being major ones. Before 1.0 the second number counts as major."""

    def major(version: Version) -> tuple[int, int]:
        return version.major, 0 if version.major else version.minor

    return [str(new) for (new, n), (old, m) in pairwise(found) if n != m and not (major(new) > major(old) and n > m)]


def test_the_changelog_names_the_numerics_of_every_release() -> None:
    found = releases((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert found[0] == (Version(q.__version__), version_map.NUMERICS)
    assert unannounced(found) == []


def test_other_numerics_are_a_major_release() -> None:
    text = "## [{}] - 2027-01-01\n\nNumerics: {}\n\n## [1.2.0] - 2026-12-01\n\nNumerics: 3\n"
    for version, number, wrong in (("2.0.0", 4, False), ("1.3.0", 3, False), ("1.3.0", 4, True), ("2.0.0", 2, True)):
        assert bool(unannounced(releases(text.format(version, number)))) is wrong
    early = "## [{}] - 2027-01-01\n\nNumerics: 2\n\n## [0.1.1] - 2026-12-01\n\nNumerics: 1\n"
    assert not unannounced(releases(early.format("0.2.0")))
    assert unannounced(releases(early.format("0.1.2")))
    with pytest.raises(AssertionError, match=r"1\.2\.0"):
        releases("## [1.2.0] - 2026-12-01\n\n### Added\n")
