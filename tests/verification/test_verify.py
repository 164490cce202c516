"""The verification: its arithmetic against plain formulas, its rows, what makes it fail, resume from and refuse."""

import copy
import gc
import json
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import qwen2_fp16_fix
from qwen2_fp16_fix import demo
from qwen2_fp16_fix.cli import commands as cli
from qwen2_fp16_fix.hub.model_card import read_verification
from qwen2_fp16_fix.verification import divergence as closeness
from qwen2_fp16_fix.verification import rows as verification_rows
from qwen2_fp16_fix.verification import verify as verification
from qwen2_fp16_fix.verification.divergence import Closeness, OracleLogits, sliding_windows
from tests.helpers import kl_to
from tests.stress.models import TINY, build

pytestmark = pytest.mark.xdist_group("verify")  # one worker runs the demo's table once, for all

SHORT: dict[str, Any] = {"window": 24, "stride": 12, "tokens": 60, "device": "cpu"}
CPU = torch.device("cpu")
TEXT = "".join(chr(32 + number * 37 % 90) for number in range(200))


def tokenizer(text: str, return_tensors: str) -> dict[str, torch.Tensor]:
    """A letter is a token."""
    return {"input_ids": torch.tensor([[ord(letter) % TINY.vocab for letter in text]])}


def tiny(folder: Path, *kinds: str) -> Path:
    build(TINY, kinds).half().save_pretrained(folder)
    return folder


def table(folder: Any, **options: Any) -> dict[str, Any]:
    return qwen2_fp16_fix.verify(folder, TEXT, tokenizer=tokenizer, **{**SHORT, **options})


@pytest.fixture(scope="module")
def findings() -> dict[str, Any]:
    return qwen2_fp16_fix.verify(demo.CHECKPOINT, window=256, stride=128, tokens=400, device="cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny(tmp_path / "checkpoint")


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle and float16 eager, for tests that ask nothing of the others."""
    rows = [verification_rows.ORACLE, *(verification_rows.Row("float16", "eager", fixed) for fixed in (False, True))]
    monkeypatch.setattr(verification, "planned_rows", lambda device: rows)
    monkeypatch.setattr(verification_rows, "NEW_TOKENS", 4)


def row(findings: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in findings["rows"] if row["name"] == name)


@pytest.mark.parametrize(("tokens", "length", "stride"), [(2, 8, 4), (8, 8, 4), (9, 8, 7), (100, 16, 5), (101, 16, 1)])
def test_every_token_but_the_first_is_scored_once_with_all_its_context(tokens: int, length: int, stride: int) -> None:
    scored: list[int] = []
    for window in sliding_windows(tokens, length, stride):
        scored += range(window.first, window.end)
        ahead = range(window.start, window.end)[window.predictions]
        assert [place + 1 for place in ahead] == list(range(window.first, window.end))
        assert window.end - window.start <= length
        assert window.first - window.start >= (1 if window.start == 0 else length - stride)
    assert scored == list(range(1, tokens))


def test_sums_are_the_direct_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of three tokens, so that no piece is lost or counted twice."""
    monkeypatch.setattr(closeness, "CHUNK", 3 * TINY.vocab)
    torch.manual_seed(0)
    oracle, targets = 8 * torch.randn(10, TINY.vocab), torch.randint(TINY.vocab, (10,))
    logits = (oracle + torch.randn(10, TINY.vocab)).half()
    found = Closeness()
    for part in (slice(0, 4), slice(4, 10)):
        found.add(logits[part], oracle[part], targets[part])
    summary = found.summary()
    assert summary["kl_mean"] == pytest.approx(kl_to(oracle, logits), rel=1e-12)
    assert summary["kl_max"] == pytest.approx(max(map(kl_to, oracle, logits)), rel=1e-12)
    loss = torch.nn.functional.cross_entropy(logits.double(), targets)
    assert summary["perplexity"] == pytest.approx(math.exp(loss), rel=1e-12)
    assert summary["top1_agreement"] == float((oracle.argmax(-1) == logits.argmax(-1)).double().mean()) < 1
    assert summary["largest_logit_difference"] == float((oracle.double() - logits.double()).abs().max())


def test_a_perplexity_past_fp64_is_none() -> None:
    """Finite logits of 60,000 for another token: exp of the loss does not exist, and is no traceback."""
    found = Closeness()
    logits = torch.tensor([[60000.0, -60000.0]])
    found.add(logits, logits, torch.tensor([1]))
    assert found.perplexity() is None


@pytest.mark.usefixtures("few_rows")
def test_a_row_is_the_plain_computation(checkpoint: Path) -> None:
    """Token by token, each with the context its window gives it, from a model loaded here."""
    found = row(table(checkpoint), "fixed float16 eager")
    tokens = tokenizer(TEXT, "pt")["input_ids"][:, :60]
    oracle = demo.load(checkpoint, False, torch.float32, "eager")
    model = demo.load(checkpoint, True, torch.float16, "eager")
    losses, divergences = [], []
    for token in range(1, 60):
        start = 0 if token < 24 else 12 * ((token - 24) // 12 + 1)
        end = min(start + 24, 60)
        theirs, own = (demo.forward(m, tokens[:, start:end])[0, token - 1 - start].double() for m in (oracle, model))
        losses.append(-float(own.log_softmax(-1)[tokens[0, token]]))
        divergences.append(kl_to(theirs, own))
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 59), rel=1e-9)
    assert found["kl_mean"] == pytest.approx(sum(divergences) / 59, rel=1e-6, abs=1e-12)
    assert found["kl_max"] == pytest.approx(max(divergences), rel=1e-6, abs=1e-12)


def test_the_demo_table(findings: dict[str, Any]) -> None:
    names = [row["name"] for row in findings["rows"]]
    assert len(names) == len(set(names)) == 12
    for found in findings["rows"]:
        assert found["finite"] == (found["fixed"] or found["dtype"] != "float16"), found["name"]
        if not found["finite"]:
            assert {found[key] for key in verification_rows.UNKNOWN} == {found["drift"]} == {None}
            assert found["first_differences"] == [0, 0, 0]
    assert row(findings, "stock float16 eager")["first_overflow"] == "layer 0, raw scores q·k"
    assert row(findings, "stock float16 sdpa")["first_overflow"].startswith("layer 2, ")
    for attention in ("eager", "sdpa"):
        fixed = row(findings, f"fixed float16 {attention}")
        assert fixed["kl_mean"] < 1e-5  # the demo's own bound on this text; measured 1.2e-6
        assert abs(fixed["drift"]) < 3e-4  # float16's noise of 1.7e-3 a token over the root of 399, thrice
        assert fixed["first_overflow"] is None
    stock, fixed = (row(findings, f"{kind} bfloat16 eager") for kind in ("stock", "fixed"))
    assert stock["kl_mean"] > 1000 * fixed["kl_mean"]
    assert findings["passed"]


def test_the_oracle_row_is_the_oracle_and_fixed_fp32_equals_it(findings: dict[str, Any]) -> None:
    for found in (findings["rows"][0], row(findings, "fixed float32 eager")):
        assert (found["drift"], found["kl_mean"], found["kl_max"], found["largest_logit_difference"]) == (0, 0, 0, 0)
        assert (found["top1_agreement"], found["first_differences"]) == (1, [None, None, None])


def test_findings_are_json_and_are_rendered(findings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(json.dumps(findings, allow_nan=False)) == findings
    assert read_verification(findings) == findings  # an export's model card takes them
    verification.render(findings, verification.Console(width=80))
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "stock fp16 eager" in shown
    assert "Verified: every fixed row is finite" in shown
    assert "not finite: stock float16 eager" in " ".join(shown.split())


def test_shortcomings_name_the_row(findings: dict[str, Any]) -> None:
    broken = copy.deepcopy(findings["rows"])
    kl, drift = (row(findings, "fixed float16 eager")[key] for key in ("kl_mean", "drift"))
    assert not verification.shortcomings(broken, 1.0, 1.0)
    (reason,) = {r.split(" has ")[1] for r in verification.shortcomings(broken, kl / 2, 1.0) if " eager " in r}
    assert reason == f"a mean KL of {kl:.3g}, above {kl / 2:g}"
    assert any("drift" in reason for reason in verification.shortcomings(broken, None, abs(drift) / 2))
    broken[-1].update(finite=False, first_overflow="layer 1, residual stream")
    assert verification.shortcomings(broken, None, None) == [
        "fixed bfloat16 sdpa is not finite, first in layer 1, residual stream"
    ]


def test_bad_perplexities_on_either_side_count(findings: dict[str, Any]) -> None:
    """A drift below 0 is a drift, and one that is unknown is not a small one."""
    rows = copy.deepcopy(findings["rows"])
    for drift in (-0.5, None):
        row({"rows": rows}, "fixed float16 sdpa")["drift"] = drift
        assert len(verification.shortcomings(rows, None, 0.1)) == 1


@pytest.mark.parametrize(
    ("extra", "code"), [([], 0), (["--max-kl", "1", "--max-ppl-drift", "1"], 0), (["--max-kl", "0"], 1)]
)
def test_thresholds_decide_the_exit_code(
    findings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, extra: list[str], code: int
) -> None:
    monkeypatch.setattr(verification, "measure", lambda bench, of: copy.deepcopy(row(findings, of.name)))
    done = CliRunner().invoke(cli.app, ["verify", str(demo.CHECKPOINT), "--json", "--device", "cpu", *extra])
    found = json.loads(done.stdout)
    assert (done.exit_code, found["passed"]) == (code, code == 0)
    assert found["verdict"].startswith("Not verified: fixed float16 eager has a mean KL" if code else "Verified: ")


def test_the_command_and_its_exit_codes(python: Callable[..., Any], tmp_path: Path) -> None:
    command = ("-m", "qwen2_fp16_fix", "verify")
    quick = ("--tokens", "40", "--window", "32", "--device", "cpu")
    done = python(*command, str(demo.CHECKPOINT), *quick, "--max-ppl-drift", "0")
    assert (done.returncode, "Not verified: fixed float16" in done.stdout) == (1, True), done.stderr
    assert "Traceback" not in done.stderr
    done = python(*command, str(tmp_path / "elsewhere"))
    assert (done.returncode, done.stderr.startswith("qwen2-fp16-fix: there is no ")) == (2, True)
    done = python(*command, str(demo.CHECKPOINT), QWEN2_FP16_FIX="0")
    assert (done.returncode, "QWEN2_FP16_FIX=0 switches the fix off" in done.stderr) == (2, True)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The rows that are loaded; at each load every model loaded before must be gone."""
    alive: list[weakref.ref[Any]] = []
    names: list[str] = []
    plain = verification_rows.load

    def watched(folder: Path, fixed: bool, dtype: torch.dtype, attention: str) -> Any:
        assert all(model() is None for model in alive), f"a model is still there as number {len(alive) + 1} is loaded"
        names.append(f"{'fixed' if fixed else 'stock'} {str(dtype).removeprefix('torch.')} {attention}")
        model = plain(folder, fixed, dtype, attention)
        model.__dict__["cycle"] = model  # as hooks and caches make them: such a model outlives its last name
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(verification_rows, "load", watched)
    gc.disable()  # what frees the models must be the code, not luck
    yield names
    gc.enable()


def test_one_copy_of_the_weights_at_a_time(checkpoint: Path, loads: list[str]) -> None:
    table(checkpoint)
    assert len(loads) == 12
    assert len(set(loads)) == 12


def test_a_run_that_was_cut_off_goes_on(
    checkpoint: Path, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished rows are not run again but for the oracle, whose logits the others need."""
    monkeypatch.setattr(verification_rows, "NEW_TOKENS", 4)
    file = tmp_path / "rows.json"
    plain = verification.measure

    def cut(bench: Any, of: Any) -> Any:
        if of.name == "stock float16 eager":
            raise KeyboardInterrupt
        return plain(bench, of)

    monkeypatch.setattr(verification, "measure", cut)
    with pytest.raises(KeyboardInterrupt):
        table(checkpoint, resume=file)
    monkeypatch.setattr(verification, "measure", plain)
    assert len(json.loads(file.read_text())["rows"]) == len(loads) == 4
    loads.clear()
    resumed = table(checkpoint, resume=file)
    assert (loads[0], len(loads)) == ("stock float32 eager", 9)
    assert "fixed float32 eager" not in loads
    loads.clear()
    assert table(checkpoint, resume=file)["rows"] == resumed["rows"]
    assert loads == []
    timeless = [{k: v for k, v in found.items() if k not in ("seconds", "peak_bytes")} for found in resumed["rows"]]
    fresh = table(checkpoint)["rows"]
    assert [{k: v for k, v in found.items() if k not in ("seconds", "peak_bytes")} for found in fresh] == timeless
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.usefixtures("few_rows")
def test_a_file_of_something_else_is_refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are compared whole: here one of them is changed, and nothing else."""
    file = tmp_path / "rows.json"
    table(checkpoint, resume=file)
    refused = qwen2_fp16_fix.VerificationError
    for change in ({"window": 20}, {"stride": 3}, {"tokens": 50}):
        with pytest.raises(refused, match="was made with another"):
            table(checkpoint, resume=file, **change)
    with pytest.raises(refused, match="was made with another text: "):
        qwen2_fp16_fix.verify(checkpoint, TEXT + "x", tokenizer=tokenizer, resume=file, **SHORT)
    stored = json.loads(file.read_text())
    stored["key"]["set of versions"]["torch"] = "1.0"
    (tmp_path / "old.json").write_text(json.dumps(stored))
    with pytest.raises(refused, match="another set of versions: "):
        table(checkpoint, resume=tmp_path / "old.json")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] += 1
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(refused, match="another checkpoint: "):
        table(checkpoint, resume=file)
    for content in ("", "[]", '{"key": {}}', '{"key": {}, "rows": [1]}', "\xff"):
        file.write_text(content, encoding="latin-1")
        with pytest.raises(refused, match="holds no finished rows"):
            table(checkpoint, resume=file)
    monkeypatch.setattr(verification, "measure", lambda *_: pytest.fail("hours of work before the file is tried"))
    with pytest.raises(refused, match="cannot be written"):
        table(checkpoint, resume=tmp_path / "no folder" / "rows.json")


def test_rows_in_an_impossible_place_are_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    """What was begun could not be removed either, and that was the traceback shown."""
    (tmp_path / "file").touch()
    with pytest.raises(qwen2_fp16_fix.VerificationError, match=r"cannot be written \(Not a directory"):
        table(checkpoint, resume=tmp_path / "file" / "rows.json")


@pytest.mark.usefixtures("few_rows")
def test_a_loaded_model_is_verified(checkpoint: Path) -> None:
    """Its rows are those of its folder, also when it is fixed, and it stays as it was."""
    model = demo.load(checkpoint, True, torch.float16, "sdpa")
    found = table(model)
    assert [row["perplexity"] for row in found["rows"]] == [row["perplexity"] for row in table(checkpoint)["rows"]]
    assert found["checkpoint"] == "Qwen2ForCausalLM"
    assert qwen2_fp16_fix.status(model).model.fixed
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="has no tokenizer: pass tokenizer="):
        qwen2_fp16_fix.verify(model, TEXT)
    model.generation_config.temperature = 0.1  # with do_sample=False, which transformers refuses to save
    model.generation_config.do_sample = False
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="transformers cannot save this model"):
        table(model)


def test_models_that_a_folder_would_not_hold_are_refused(checkpoint: Path) -> None:
    peft = pytest.importorskip("peft")
    model = build(TINY, ()).half()
    with pytest.raises(qwen2_fp16_fix.NotQwen2Error, match="this is a Qwen2Model"):
        table(model.model)
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="up_proj is a Sequential"):
        table(model)
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="is quantised"):
        table(model)
    with torch.device("meta"):
        empty = type(model)(build(TINY, ()).config)
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="not loaded"):
        table(empty)
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):  # PEFT asks transformers for it
        wrapped = peft.get_peft_model(build(TINY, ()).half(), peft.LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="has a PEFT adapter"):
        table(wrapped)


def damage(folder: Path, name: str) -> None:
    """Takes one tensor out of a checkpoint, which transformers would fill with random numbers, without a word here."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


BAD_FOLDERS: dict[str, Callable[[Path], Any]] = {
    "has no config.json": lambda f: (f / "config.json").unlink(),
    "of type 'llama', not 'qwen2'": lambda f: edit_config(f, model_type="llama"),
    "is quantised": lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}),
    "holds a PEFT adapter": lambda f: (f / "adapter_config.json").write_text("{}"),
    "has no tensor lm_head.weight": lambda f: damage(f, "lm_head.weight"),
    "has no tensor model.layers.3.mlp.up_proj": lambda f: damage(f, "model.layers.3.mlp.up_proj.weight"),
    "is damaged or half written": lambda f: (f / "model.safetensors").write_bytes(b"12345678901"),
    "gate_proj.weight has shape": lambda f: edit_config(f, intermediate_size=128),
    "rope_theta = 'x', not a finite number": lambda f: edit_config(f, rope_theta="x"),
    "vocab_size = None, not a whole number": lambda f: edit_config(f, vocab_size=None),
    "transformers cannot load": lambda f: edit_config(f, hidden_act="foo"),
}


@pytest.mark.parametrize("sentence", BAD_FOLDERS)
def test_a_bad_checkpoint_is_one_sentence(checkpoint: Path, sentence: str) -> None:
    BAD_FOLDERS[sentence](checkpoint)
    with pytest.raises((qwen2_fp16_fix.CheckpointError, qwen2_fp16_fix.NotQwen2Error)) as caught:
        table(checkpoint)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_SHARDS: dict[str, Callable[[Path], Any]] = {
    "is missing: the download is unfinished": lambda shard: shard.unlink(),
    "is damaged or half written": lambda shard: shard.write_bytes(shard.read_bytes()[:-100]),
    "which its index says: it is another's": lambda shard: shard.write_bytes(
        sorted(shard.parent.glob("*.safetensors"))[0].read_bytes()
    ),
}


@pytest.mark.parametrize("sentence", BAD_SHARDS)
def test_a_bad_shard_is_one_sentence(tmp_path: Path, sentence: str) -> None:
    build(TINY, ()).half().save_pretrained(tmp_path, max_shard_size="200KB")
    BAD_SHARDS[sentence](sorted(tmp_path.glob("*.safetensors"))[-1])
    with pytest.raises(qwen2_fp16_fix.CheckpointError) as caught:
        table(tmp_path)
    assert sentence in str(caught.value)


def test_a_checkpoint_that_is_nan_in_fp32_is_named(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        qwen2_fp16_fix.CheckpointError, match="first in layer 1, down_proj output: the checkpoint is br"
    ):
        table(checkpoint)


def test_bad_texts_and_tokenizers_are_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    refused = qwen2_fp16_fix.VerificationError
    with pytest.raises(refused, match=r"text.txt cannot be read \(No such file"):
        qwen2_fp16_fix.verify(demo.CHECKPOINT, file)
    file.write_bytes(b"caf\xe9")
    with pytest.raises(refused, match="is not UTF-8"):
        qwen2_fp16_fix.verify(demo.CHECKPOINT, file)
    file.write_text(" \n")
    with pytest.raises(refused, match=r"text\.txt is empty"):
        qwen2_fp16_fix.verify(demo.CHECKPOINT, file)
    with pytest.raises(refused, match="a single token"):
        qwen2_fp16_fix.verify(checkpoint, "x", tokenizer=tokenizer)
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match=r"has no tokenizer: copy tokenizer\.json"):
        qwen2_fp16_fix.verify(checkpoint, TEXT)
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="cannot be loaded"):
        qwen2_fp16_fix.verify(checkpoint, TEXT)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).write_bytes((demo.CHECKPOINT / name).read_bytes())
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="vocabulary ends at 127: it is another model's tokenizer"):
        qwen2_fp16_fix.verify(checkpoint, "And the LORD said unto Moses,")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"window": 4097}, "a window of 4097 tokens: give 2 to 4096"),
        ({"window": 1}, "a window of 1 tokens"),
        ({"stride": 24}, "a stride of 24 for a window of 24: give 1 to 23"),
        ({"stride": 0}, "a stride of 0"),
        ({"tokens": 1}, "1 tokens: give at least 2"),
        ({"device": "tpu"}, "'tpu' is no device to verify on"),
        ({"device": "cuda:99"}, "there is no cuda:99 here"),
        ({"max_kl": math.nan}, "a threshold of nan decides nothing"),
        ({"max_ppl_drift": -1.0}, "a threshold of -1.0 decides nothing"),
    ],
)
def test_bad_settings_are_one_sentence(checkpoint: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(qwen2_fp16_fix.VerificationError, match=sentence):
        table(checkpoint, **options)


def test_a_row_that_is_not_what_it_is_called_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock classes taken over in this process, as `run` does, or a fixed model without its fix."""
    fixed = verification_rows.Row("float16", "eager", fixed=True)
    stock = verification_rows.Row("float16", "eager", fixed=False)
    other = verification_rows.Row("float16", "sdpa", fixed=False)
    for asked, found in ((stock, fixed), (fixed, stock), (other, stock)):
        model = demo.load(checkpoint, found.fixed, torch.float16, found.attention)
        monkeypatch.setattr(verification_rows, "load", lambda *_, model=model: model)
        with pytest.raises(qwen2_fp16_fix.PatchConflictError, match=f"{asked.name} was loaded as {found.name}"):
            verification_rows.open_row(checkpoint, asked, CPU)
    model = demo.load(checkpoint, True, torch.float16, "eager")
    model.model.norm.__class__ = type(demo.load(checkpoint, False, torch.float16, "eager").model.norm)
    monkeypatch.setattr(verification_rows, "load", lambda *_: model)
    for asked in (fixed, stock):  # partly fixed is neither
        with pytest.raises(qwen2_fp16_fix.PatchConflictError):
            verification_rows.open_row(checkpoint, asked, CPU)
    monkeypatch.setenv("QWEN2_FP16_FIX", "0")
    with pytest.raises(qwen2_fp16_fix.VerificationError, match="switches the fix off"):
        table(checkpoint)


def test_flash_rows_come_where_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = verification_rows.transformers.utils
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(utils, "is_flash_attn_3_available", lambda: True, raising=False)
    gpu = torch.device("cuda")
    for capability, kernels in (((7, 5), []), ((8, 0), [2]), ((9, 0), [2, 3]), ((10, 0), [2])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert verification_rows.flash_attentions(gpu) == [f"flash_attention_{number}" for number in kernels]
    assert verification_rows.flash_attentions(CPU) == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    rows = verification.planned_rows(gpu)
    assert len(rows) == 12 + 2 * 2 * 2
    assert not any(row.dtype == "float32" and "flash" in row.attention for row in rows)


def test_continuations_are_compared_token_by_token() -> None:
    differs = verification_rows.first_difference
    assert differs([1, 2, 3], [1, 2, 3]) is None
    assert differs([1, 2, 3], [1, 5, 3]) == 1
    assert differs([1, 2], [1, 2, 3]) == 2
    assert [p.tolist() for p in verification_rows.prompts_of(torch.arange(5)[None])] == [[[0, 1, 2, 3, 4]]] * 3
    starts = [int(p[0, 0]) for p in verification_rows.prompts_of(torch.arange(100)[None])]
    assert starts == [0, 34, 68]


def test_the_disk_is_asked_before_hours_are_spent(tmp_path: Path) -> None:
    with pytest.raises(qwen2_fp16_fix.VerificationError, match="lower the number of tokens, or set TMPDIR"):
        OracleLogits(tmp_path, 10**18)
    store = OracleLogits(tmp_path, 20)
    whole = torch.randn(100, 20)
    store.put(0, whole[3:4])
    assert torch.equal(store.get(0), whole[3:4])
    assert (tmp_path / "0.pt").stat().st_size < whole.numel() * 4  # not what the slice was cut from


OLDER_PEAK = """
import gc, sys, torch
from qwen2_fp16_fix.verification.peak_memory import PeakMemory

assert torch.ones(120 * 2**18).sum() > 0  # 120 MiB, gone again: above 32 MiB glibc always gives pages back
gc.disable()
litter = [torch.ones(100 * 2**18)]
litter.append(litter)
del litter  # 100 MiB that only the collector frees
peak = PeakMemory(torch.device("cpu"))
if peak.before is None:
    sys.exit("this kernel does not lower its high-water mark")
gc.collect()
assert torch.ones(60 * 2**18).sum() > 0
print(peak.bytes())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of the peak")
def test_neither_an_older_peak_nor_litter_hides_a_newer_one(python: Callable[..., Any]) -> None:
    """In a process of its own: what a test worker frees meanwhile would be taken off the peak."""
    done = python("-c", OLDER_PEAK)
    if "does not lower" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert 50 * 2**20 < int(done.stdout) < 80 * 2**20


def test_a_peak_that_the_kernel_hides_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that ignores the reset, and a system without /proc: None, not a peak of something earlier."""
    from qwen2_fp16_fix.verification import peak_memory

    monkeypatch.setattr(peak_memory, "PROCESS", tmp_path / "proc")
    assert peak_memory.PeakMemory(CPU).bytes() is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "status").write_text("VmHWM:\t  900000 kB\nVmRSS:\t  500000 kB\n")
    assert peak_memory.PeakMemory(CPU).bytes() is None
    (tmp_path / "proc" / "status").write_text("VmHWM:\t  500000 kB\nVmRSS:\t  500000 kB\n")
    peak = peak_memory.PeakMemory(CPU)
    (tmp_path / "proc" / "status").write_text("VmHWM:\t  500100 kB\nVmRSS:\t  500000 kB\n")
    assert peak.bytes() == 100 * 1024
