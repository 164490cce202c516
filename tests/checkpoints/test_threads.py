"""torch computes with the cores that this process may use, and afterwards with as many as before."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen2_fp16_fix
from qwen2_fp16_fix import demo
from qwen2_fp16_fix.checkpoints import threads
from qwen2_fp16_fix.diagnosis import self_test

DEMO = demo.CHECKPOINT
V1 = {"cpu/a/cpu.cfs_quota_us": "150000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2),
        ("0::/of/the/host\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, 8),
        ("3:cpuset:/a\n1:cpu,cpuacct:/a\n0::/\n", V1, 2),
        ("1:cpu:/a\n", V1 | {"cpu/a/cpu.cfs_quota_us": "-1\n"}, 8),
    ],
)
def test_a_mask_and_a_share_of_time_both_count(
    membership: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "membership").write_text(membership)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(threads, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(threads, "GROUPS", tmp_path)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: range(8), raising=False)
    assert threads.usable_cores() == cores


@pytest.fixture
def three_of_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in threads.CHOSEN_BY:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


class ReachedError(BaseException):
    """Ends a run where it is counted."""


#: A call, and a function inside it.
RUNS: dict[str, tuple[Callable[[], Any], str]] = {
    "certify": (lambda: qwen2_fp16_fix.certify(DEMO), "certification.certify:settings_of"),
    "scan": (lambda: qwen2_fp16_fix.scan(DEMO), "scanning.scan:read_prompts"),
    "verify": (lambda: qwen2_fp16_fix.verify(DEMO), "verification.verify:read_text"),
    "demo": (demo.measure, "demo:_load_text"),
    "self-test": (lambda: self_test.self_test("cpu"), "diagnosis.self_test:_oracle"),
}


@pytest.mark.usefixtures("three_of_torch")
@pytest.mark.parametrize("cores", [2, 8])
@pytest.mark.parametrize("chosen", [None, "OMP_NUM_THREADS"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_takes_the_cores_that_are_ours(
    name: str, chosen: str | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo took 43 s of CPU time on a shared machine; one thread takes 8. A user's own number stays."""
    run, inside = RUNS[name]
    seen = list[int]()

    def count(*_: object) -> None:
        seen.append(torch.get_num_threads())
        raise ReachedError

    module, function = inside.split(":")
    monkeypatch.setattr(importlib.import_module(f"qwen2_fp16_fix.{module}"), function, count)
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    if chosen is not None:
        monkeypatch.setenv(chosen, "3")
    with pytest.raises(ReachedError):
        run()
    tiny = name in ("demo", "self-test")
    assert seen == [1 if tiny else 3 if chosen else min(3, cores)]
    assert torch.get_num_threads() == 3
