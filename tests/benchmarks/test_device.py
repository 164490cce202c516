"""The proof of a device: what a surprise may cost, what it says in the end, and its real sections on tiny models."""

import json
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import models, report
from benchmarks.__main__ import app
from benchmarks.device import accuracy, launches, proof, prove, scores, sizes, supervised, tables
from benchmarks.device.proof import NotAvailable, Proof
from tests import stress

CPU = torch.device("cpu")
TINY = replace(
    sizes.CPU,
    kinds=(stress.KINDS,),
    tokens=16,
    plan_width="tiny",
    widths=("tiny",),
    contexts=(8,),
    prompts=(8,),
    score_shapes=("tiny",),
    shortest=0.0,
)


def good(of: Proof) -> None:
    with of.row("plans", weights="good") as row:
        row["same"] = True


def broken(of: Proof) -> None:
    of.promise(False, "One and one are three.")


def crashes(of: Proof) -> None:
    with of.row("plans", weights="before"):
        pass
    raise ValueError("no such thing")


def crashes_in_a_row(of: Proof) -> None:
    for name in ("first", "second"):
        with of.row("plans", weights=name) as row:
            row["same"] = 1 / (name == "second")


def lacks_a_kernel(of: Proof) -> None:
    with of.row("plans", weights="none"):
        raise NotAvailable("no kernel")


def hangs(of: Proof) -> None:
    with of.row("plans", weights="endless"):
        time.sleep(60)


@pytest.mark.parametrize(
    ("section", "code", "said", "rows"),
    [
        (good, 0, "No promise was broken.", 1),
        (lacks_a_kernel, 0, "No promise was broken.", 1),
        (broken, 1, "One and one are three.", 0),
        (crashes, 1, "The section first ended in ValueError: no such thing", 1),
        (crashes_in_a_row, 1, "plans, first: it ended in ZeroDivisionError: division by zero", 2),
        (hangs, 0, "Left out for want of time: 1 cases.", 1),
    ],
)
def test_a_surprise_costs_a_row_or_a_section_and_a_broken_promise_the_exit_code(
    section: Callable[[Proof], None], code: int, said: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove, "SECTIONS", {"first": (section, 0.0), "last": (good, 1.0)})
    monkeypatch.setattr(proof, "GRACE", 0.1)
    path = tmp_path / "gpu.json"
    result = CliRunner().invoke(app, ["gpu", "--device", "cpu", "--budget", "1", "--out", str(path)])
    assert (result.exit_code, said in result.output) == (code, True), result.output
    found = json.loads(path.read_text("utf-8"))
    assert len(found["rows"]["plans"]) == rows + 1
    assert found["rows"]["plans"][-1] == {"weights": "good", "same": True}
    assert [*found["seconds"]] == ["first", "last"]


def test_a_section_that_is_not_there_is_wrong_usage() -> None:
    result = CliRunner().invoke(app, ["gpu", "--only", "speed"])
    assert (result.exit_code, "no section speed" in result.output) == (2, True)


def aborts(of: Proof) -> None:
    good(of)
    of.save()
    raise SystemExit(-signal.SIGABRT)  # what a failed assert of a kernel does to the process, from a destructor


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (crashes, "The section first ended in ValueError: no such thing"),
        (aborts, "The section first ended its process in SIGABRT."),
    ],
)
def test_a_lost_device_and_a_dead_process_cost_one_section(
    first: Callable[[Proof], None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time the rest runs in a new process, over the same file."""
    usable = iter([False, True])
    monkeypatch.setattr(prove, "SECTIONS", {"first": (first, 1.0), "last": (good, 1.0)})
    monkeypatch.setattr(Proof, "is_usable", lambda self: next(usable))
    path = tmp_path / "gpu.json"
    path.write_text("of an older proof", "utf-8")
    codes: list[int] = []

    def start(options: list[str]) -> int:
        codes.append(CliRunner().invoke(app, ["gpu", *options]).exit_code)
        return codes[-1]

    found = supervised.supervised("cpu", 5.0, list(prove.SECTIONS), path, start)
    assert codes == [supervised.DEVICE_LOST if first is crashes else -signal.SIGABRT, 1]
    assert found == json.loads(path.read_text("utf-8"))
    assert found["broken"] == [said]
    assert [row["weights"] for row in found["rows"]["plans"]] == ["before" if first is crashes else "good", "good"]


def test_a_proof_that_never_begins_is_not_tried_for_ever(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 3 before any section began"):
        supervised.supervised("cpu", 5.0, ["accuracy"], tmp_path / "gpu.json", lambda options: 3)


def test_real_sections_on_tiny_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a card runs, here on a CPU, whose torch has no cuDNN: that row says so. The tables take every row."""
    monkeypatch.setitem(models.WIDTHS, "tiny", stress.TINY)
    monkeypatch.setitem(scores.HEADS, "tiny", (4, 2, 32))
    monkeypatch.setattr(accuracy, "FUSED", ["eager", "sdpa", "sdpa cudnn"])
    only = ("accuracy", "plans", "decode", "prompts", "score-time")
    found = prove.prove(CPU, 0.0, only, tmp_path / "gpu.json", TINY)  # no time: one row each
    assert found.broken == []
    assert len(found.left_out) > len(only)
    assert {name: len(rows) for name, rows in found.rows.items()}.keys() == {
        "accuracy", "plans", "decode", "prompts", "score time"
    }  # fmt: skip
    row = found.rows["accuracy"][0]
    assert row["stock_kl"] is None  # not finite
    assert row["fixed_kl"] < accuracy.CLOSE
    assert row["cached_kl"] < accuracy.CLOSE
    found.until = float("inf")
    found.rows["accuracy"].clear()
    monkeypatch.setattr(accuracy, "CLOSE", 0.0)  # what no model keeps
    accuracy.accuracy(found)
    assert [("not_available" in row) for row in found.rows["accuracy"]] == [False, False, True] * 2
    assert len(found.broken) == 4  # whole and over a cache, eager and sdpa, in float16
    text = tables.markdown(found.found())
    assert "cache: eager, sdpa. Not available: sdpa cudnn." in text
    assert "| all | fp16 | not finite | not finite | " in text
    assert "for 1 of 1 models" in text
    assert len(re.findall("^\\| tiny \\|", text, re.MULTILINE)) == 3  # decode, prompts, score time


def test_counts_that_are_two_apart_are_told_apart_by_name() -> None:
    """One apart is allowed, and what a library starts beside a kernel is not ours to count."""
    ours = Counter({"mm": 7, "add": 2})
    near, far = (Counter({"gemm": 7, "splitKreduce_kernel": 3, "add_kernel": adds}) for adds in (3, 4))
    assert launches.beside(ours, None)["seen"] is None
    assert launches.beside(ours, near) == {"counted": 9, "seen": 10, "helpers": 3}
    found = launches.beside(ours, far)
    assert found["our_names"] == {"mm": 7, "add": 2}
    assert found["their_names"] == {"gemm": 7, "add_kernel": 4, "splitKreduce_kernel": 3}
    assert launches.is_apart(found)


@pytest.mark.parametrize("name", [name for name in scores.WAYS if name != "TF32"])
def test_every_way_to_compute_scores_computes_them(name: str) -> None:
    """A rounded query is off by 2^-11 of it, one in two halves by no more than fp32."""
    given = replace_heads("tiny")
    error = scores.error_of(scores.WAYS[name], given)["error"]
    assert error < (5e-4 if name in scores.ROUNDING else 1e-6)


def replace_heads(name: str) -> scores.Operands:
    """Operands of a small attention."""
    scores.HEADS[name] = (4, 2, 32)
    try:
        return scores.operands(name, 3, 16, CPU)
    finally:
        del scores.HEADS[name]


def test_the_document_takes_a_proof_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, kept = tmp_path / "page.md", tmp_path / "gpu.json"
    page.write_text("before\n<!-- device:begin -->\nold\n<!-- device:end -->\nafter\n", "utf-8")
    monkeypatch.setattr(report, "DOCUMENT", page)
    found: Any = Proof(CPU, TINY, kept, 1.0, environment=report.environment(CPU))
    good(found)
    found.save()
    assert CliRunner().invoke(app, ["document", str(kept)]).exit_code == 0
    assert "0 of 1 models." in page.read_text("utf-8")
    assert "old" not in page.read_text("utf-8")


def test_the_page_sums_up_the_proof_that_is_kept() -> None:
    """Its sentences are written by hand: the figures in them are of the JSON file below."""
    page = " ".join(report.DOCUMENT.read_text("utf-8").split())
    found = json.loads((report.RESULTS / "nvidia-h100-80gb-hbm3.json").read_text("utf-8"))["rows"]
    half = {
        name: [row for row in found[name] if row.get("dtype") == "fp16"] for name in ("accuracy", "decode", "prompts")
    }
    kls = {name: max(row[name] for row in half["accuracy"] if row["way"] != "flex" and name in row) for name in KLS}
    assert f"at most {max(kls.values()):.1e},".replace("e-0", "e-") in page
    graphs = [row["graph"]["median"] for row in found["decode"]]
    faster = [each for each in graphs if each < 1]
    assert f"{min(faster):.2f} to {max(faster):.2f} of stock's time, in all rows but six." in page
    assert len(graphs) - len(faster) == 6
    assert f"up to {max(graphs):.2f}." in page
    tokens, prompts = ([row["median"] for row in half[name]] for name in ("decode", "prompts"))
    assert f"{min(tokens):.2f} to {max(tokens):.2f} of stock's time in float16" in page
    assert f"A prompt takes {min(prompts):.2f} to {max(prompts):.2f} in float16." in page
    assert all(not launches.is_apart(row) for row in found["launches"])


KLS = ("fixed_kl", "cached_kl")
