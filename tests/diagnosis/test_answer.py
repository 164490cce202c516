"""The doctor's answer: whether a checkpoint breaks in stock float16, where, and what to do about it."""

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen2_fp16_fix
from qwen2_fp16_fix.demo import CHECKPOINT
from qwen2_fp16_fix.diagnosis import advice, environment, redaction, stock_run
from qwen2_fp16_fix.diagnosis.answer import BREAKS, answer_for, judge
from qwen2_fp16_fix.diagnosis.checkpoint import CheckpointFacts
from qwen2_fp16_fix.diagnosis.stock_run import RAW, Reached, StockRun, layers_to_run, run_stock
from qwen2_fp16_fix.translations import DOCTOR_TEXTS
from tests.diagnosis.examples import CPU, copy_of_demo, nvidia, replace_tensors

OVER, BELOW = 70_000.0, 60_000.0


def ran(*reached: Reached, layers: int = 4) -> StockRun:
    return StockRun(layers, [0, 1], [], 20, worded=True, reached=list(reached))


CASES: dict[str, StockRun] = {
    "yes": ran(Reached(0, RAW, OVER, True), Reached(1, "residual", OVER, True)),
    "with eager attention": ran(Reached(0, RAW, OVER, True), Reached(1, "residual", BELOW, True)),
    "probably": ran(Reached(0, RAW, BELOW, True), Reached(3, "residual", OVER, False)),
    "probably with eager attention": ran(Reached(0, "residual", BELOW, True), Reached(3, RAW, OVER, False)),
    "not seen": ran(Reached(0, RAW, BELOW, True)),
}


@pytest.mark.parametrize("breaks", CASES)
def test_what_was_seen_goes_before_what_was_estimated(breaks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And raw scores, which eager attention alone stores, are told from the rest."""
    assert judge(CASES[breaks], None)[0] == breaks
    monkeypatch.setattr(stock_run, "run_stock", lambda path, progress: CASES[breaks])
    for language in DOCTOR_TEXTS:
        found = answer_for(CHECKPOINT, None, language, None)
        assert "65,504" in found.text[0]
        assert json.dumps(found.to_dict(), allow_nan=False)
    assert set(CASES) == set(BREAKS) - {"no"}


@pytest.mark.parametrize("largest", [math.inf, math.nan])
def test_a_weight_that_float16_cannot_hold_is_told_apart(largest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer was "reaches not finite, over the limit", and the advice float16 with the fix."""
    run = ran(Reached(0, "up", BELOW, True), Reached(1, "up", largest, True))
    monkeypatch.setattr(stock_run, "run_stock", lambda path, progress: run)
    found = answer_for(CHECKPOINT, None, "en", None)
    assert found.breaks == "yes"
    assert not found.weights_fit
    assert found.text[0].startswith("Breaks in float16: up of layer 1 is infinite or NaN")
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_bounds_say_more_than_prompts() -> None:
    found = qwen2_fp16_fix.certify(CHECKPOINT)
    assert judge(CASES["not seen"], found)[0] == "not seen"  # stock's bounds are over the limit
    bounded = [layer for layer in found.layers if not layer.stock_proven]
    for layer in bounded:
        object.__setattr__(layer, "stock_proven", True)
    assert judge(CASES["not seen"], found)[0] == "no"
    assert judge(CASES["yes"], found)[0] == "yes"


def test_the_demo_breaks_where_the_scan_says() -> None:
    run, scan = run_stock(CHECKPOINT), qwen2_fp16_fix.scan(CHECKPOINT)
    assert run.complete
    assert run.worded
    assert scan.first_nonfinite is not None
    first = run.over(seen=True)[0]
    assert (first.layer, first.site) == (scan.first_nonfinite.layer, scan.first_nonfinite.site)
    assert first.largest == pytest.approx(scan.first_nonfinite.largest, rel=0.02)  # it has two prompts more
    found = qwen2_fp16_fix.doctor(CHECKPOINT).checkpoint.stock
    assert found.breaks == "yes"
    assert {(place.layer, place.site) for place in found.over} >= {(0, RAW), (3, RAW), (2, "residual")}


def test_a_large_checkpoint_is_run_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layers as they are, the last on a stand-in, and the scores between from the biases alone."""
    path = copy_of_demo(tmp_path / "x")

    def spike(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in "qk":
            tensors[f"model.layers.2.self_attn.{name}_proj.bias"][5::64] = 300.0  # one channel of each head
        return tensors

    replace_tensors(path, spike)
    source = stock_run.open_checkpoint(path)
    a_layer = source.shape.hidden  # far less than one has: the least that is run is one layer at each end
    assert layers_to_run(source, a_layer) == ([0], [3])
    monkeypatch.setattr(stock_run, "layers_to_run", lambda source: ([0, 1], [3]))
    run = run_stock(path)
    assert not run.complete
    assert {each.layer for each in run.reached if each.seen} == {0, 1}
    (estimated,) = [each for each in run.reached if each.layer == 2]
    assert estimated.site == RAW
    assert estimated.largest == pytest.approx(90_000, rel=0.1)  # and what the other channels have
    found = answer_for(path, None, "en", None)
    assert "Estimated to be over the limit as well: raw scores, layer 2" in " ".join(found.text)
    assert "qwen2-fp16-fix scan PATH" in " ".join(found.text)


def test_a_checkpoint_without_a_tokenizer_is_run_on_random_tokens(tmp_path: Path) -> None:
    path = copy_of_demo(tmp_path / "x")
    (path / "tokenizer.json").unlink()
    found = answer_for(path, None, "en", None)
    assert found.tokens == 2 * stock_run.RANDOM_IDS
    assert any("random tokens" in sentence for sentence in found.text)


def test_the_code_names_the_users_path_unless_it_is_redacted(healthy: None, tmp_path: Path) -> None:
    """It said "PATH", which nobody can paste into a program."""
    path = copy_of_demo(tmp_path / 'a "folder"')
    found = qwen2_fp16_fix.doctor(path)
    calls = [node for node in ast.walk(ast.parse(found.advice[0].code)) if isinstance(node, ast.Constant)]
    assert str(path) in [node.value for node in calls]
    assert f"scan '{path}'" in " ".join(found.checkpoint.stock.text)
    assert str(path) not in json.dumps(qwen2_fp16_fix.doctor(path, redacted=True).to_dict())
    assert redaction.python_name("o/n@v1.0") == '"o/n", revision="v1.0"'
    assert redaction.python_name(Path("o/n@v1.0")) == '"o/n@v1.0"'


LOADING: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "plain": ({}, "register()", None),
    "exported": ({"exported": True}, "trust_remote_code=True", "register()"),
    "quantised": ({"quantised": "gptq"}, 'device_map="cuda"', '.to("cuda")'),
    "a classifier": ({"architectures": ["Qwen2ForSequenceClassification"]}, "AutoModelForSequenceClassification", None),
    "a base model": ({"architectures": ["Qwen2Model"]}, "AutoModel.from_pretrained", "AutoModelForCausalLM"),
    "inside another": ({"model_type": "llava", "wrapped": True}, "register()", "AutoModel"),
}


@pytest.mark.parametrize("kind", LOADING)
def test_the_code_fits_the_checkpoint(kind: str) -> None:
    changed, has, lacks = LOADING[kind]
    plain = {"model_type": "qwen2", "architectures": [], "auto_map": {}, "exported": False, "quantised": None}
    facts = CheckpointFacts(**plain | changed, layers=4, hidden=8, notes=[])
    (found,), _, _ = advice.recommend([nvidia("Tesla T4", 7, 5), CPU], "en", "5.24.0", facts)
    assert ast.parse(found.code)
    assert has in found.code
    assert lacks is None or lacks not in found.code
    assert max(map(len, found.code.splitlines())) <= 80


def test_no_float16_is_advised_for_weights_that_it_cannot_hold() -> None:
    t4 = nvidia("Tesla T4", 7, 5)
    assert [item.way for item in advice.advise([t4, CPU], fits_float16=False)] == ["float32"]
    assert [item.way for item in advice.advise([nvidia("A100", 8, 0)], fits_float16=False)] == ["bfloat16"]


def test_nothing_is_advised_for_another_model() -> None:
    llama = CheckpointFacts("llama", [], {}, False, None, 4, 8, notes=[])
    assert advice.recommend([CPU], "en", "5.24.0", llama)[0] == []


@pytest.mark.parametrize(
    ("kinds", "without"),
    [
        ({"cpu"}, {"cuda.matmul", "NVIDIA_"}),
        ({"cuda", "cpu"}, {"mkldnn"}),
        ({"rocm", "cpu"}, {"mkldnn", "NVIDIA_"}),
        ({"mps", "cpu"}, {"mkldnn", "NVIDIA_", "cuda.matmul"}),
    ],
)
def test_switches_of_other_devices_are_left_out(kinds: set[str], without: set[str]) -> None:
    """On a CPU eleven lines were about switches of CUDA."""
    names = [item.name for item in environment.settings()]
    left_out = {name for name in names if not environment.concerns(name, kinds)}
    assert left_out == {name for name in names if any(part in name for part in without)}


def test_the_page_is_short_and_the_details_have_the_rest(healthy: None) -> None:
    """It had 89 lines at 80 columns, and the answer in none of them."""
    from tests.diagnosis.test_doctor import shown

    found = qwen2_fp16_fix.doctor(CHECKPOINT)
    page = shown(found)
    assert len(page.splitlines()) <= 45
    assert page.startswith("Breaks in stock float16")
    assert "allow_fp16_accumulation" not in page + shown(found.details())
    assert "torch.autocast" in shown(found.details())
