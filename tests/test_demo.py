"""The demonstration shows what it says, and would say so if it did not."""

import filecmp
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from typer.testing import CliRunner

import qwen2_fp16_fix
from qwen2_fp16_fix import demo
from qwen2_fp16_fix.checkpoints import loading
from qwen2_fp16_fix.cli import commands
from qwen2_fp16_fix.demo import Demonstration
from qwen2_fp16_fix.patches.range_plan import FLOAT16_MAX
from tests.helpers import ROOT, kl_to, skeleton

pytestmark = pytest.mark.xdist_group("demo")  # one worker runs it once, for all


@pytest.fixture(scope="module")
def findings() -> Demonstration:
    return demo.measure()


def test_the_demo_is_as_promised(findings: Demonstration) -> None:
    assert findings.as_promised
    oracle, *others = findings.rows
    for row in others[:2]:
        assert row.text == "!" * demo.NEW_TOKENS
        assert row.perplexity is None
    for row in others[2:]:
        assert row.text == oracle.text
        # the noise of float16 rounding on 1,098 tokens: 1.7e-3 a token over the square root of their number, thrice
        assert row.perplexity == pytest.approx(oracle.perplexity, rel=1.5e-4)
    assert re.search(r"[a-z]{3,} [a-z]{3,} [a-z]{3,}", oracle.text)
    json.dumps(findings.to_dict(), allow_nan=False)


def test_a_demonstration_is_a_result(findings: Demonstration) -> None:
    """Recorded when `measure` returned a dict: every key, in the same order, with a value of the same kind."""
    recorded = json.loads((ROOT / "tests" / "recorded_results.json").read_text(encoding="utf-8"))["demo"]
    assert skeleton(json.loads(json.dumps(findings.to_dict(), allow_nan=False))) == skeleton(recorded)
    assert repr(findings) == f"<Demonstration: {findings.summary()}>"


@pytest.mark.parametrize(("page", "row"), [("fixed.md", "fixed float16"), ("zh/fixed.md", "修复后 float16")])
def test_the_pages_fixed_rows_are_what_the_demo_finds(findings: Demonstration, page: str, row: str) -> None:
    """They were remembered: eager stood at 18.838 where the demo prints 18.837."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    shown = re.search(rf"^\| \*\*{row}\*\* \| \*\*([\d.]+)\*\* \| \*\*([\d.]+)\*\* \|$", text, re.M)
    assert shown is not None
    found = [row.perplexity for row in findings.rows if row.name.startswith("fixed")]
    # half a unit of the last digit shown, and the noise of float16 rounding as above: each CPU adds up in another order
    assert [float(figure) for figure in shown.groups()] == pytest.approx(found, rel=0, abs=5e-4 + 1.5e-4 * found[0])


@pytest.mark.parametrize(("readme", "language"), [("README.md", "en"), ("README.zh-CN.md", "zh")])
def test_the_readmes_show_what_the_demo_prints(findings: Demonstration, readme: str, language: str) -> None:
    """Line by line, in a terminal of 80 columns; the last digits of a perplexity differ from CPU to CPU."""
    printed = io.StringIO()
    Console(file=printed, width=80).print(replace(findings, language=language))
    (shown,) = re.findall(r"^```\n(╭.*?)^```$", (ROOT / readme).read_text(encoding="utf-8"), re.M | re.S)
    for panel in shown.split("╭")[1:]:
        assert re.sub(r"\d\.\d+", "", panel) in re.sub(r"\d\.\d+", "", printed.getvalue()), "copy it from `demo`"


def test_the_demo_says_what_was_wrong_where(findings: Demonstration) -> None:
    stock_eager, stock_sdpa = findings.rows[1:3]
    assert stock_eager.first_overflow == "layer 0, raw scores q·k"
    assert stock_sdpa.first_overflow.startswith("layer 2, ")  # where the residual stream passes 65504
    sites = {peak.site: peak.magnitude for peak in findings.peaks}
    for site in ("layer 0, raw scores q·k", "layer 3, raw scores q·k", "layer 3, residual stream"):
        assert sites[site] > FLOAT16_MAX
    assert all(row.first_overflow is None for row in findings.rows if row.finite)


def test_the_checkpoint_can_be_saved_to_a_new_folder(tmp_path: Path) -> None:
    """scan, certify and verify take a folder, and where the package lies nobody should have to find out."""
    out = tmp_path / "new" / "demo"
    done = CliRunner().invoke(commands.app, ["demo", "--save", str(out)])
    assert (done.exit_code, done.stdout) == (0, "")
    names = [path.name for path in demo.CHECKPOINT.iterdir()]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert filecmp.cmpfiles(demo.CHECKPOINT, out, names, shallow=False)[0] == names
    with pytest.raises(qwen2_fp16_fix.ExportError, match="is not empty: name a new folder"):
        demo.save(out)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_fixed_logits_are_close_on_the_held_out_chapter(attention: str) -> None:
    _, passage = demo._load_text(demo.CHECKPOINT)
    tokens = passage[:, :512]
    oracle = loading.forward(loading.load(demo.CHECKPOINT, False, torch.float32, attention), tokens)
    fixed = loading.forward(loading.load(demo.CHECKPOINT, True, torch.float16, attention), tokens)
    assert torch.isfinite(fixed).all()
    assert kl_to(oracle, fixed) < 1e-5  # measured 1.4e-6; stock float16 on the healthy twin is at 3e-5


def test_a_demo_that_does_not_show_it_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switched off, the fixed rows print `!!!!` as well: exit code 0 would be a lie."""
    tokenizer, passage = demo._load_text(demo.CHECKPOINT)
    monkeypatch.setattr(demo, "_load_text", lambda folder: (tokenizer, passage[:, :32]))  # no promise is about it
    monkeypatch.setattr(demo, "NEW_TOKENS", 4)
    monkeypatch.setenv("QWEN2_FP16_FIX", "0")
    done = CliRunner().invoke(commands.app, ["demo", "--json"])
    assert done.exit_code == 1, done.stderr
    found = json.loads(done.stdout)
    assert not found["as_promised"]
    assert not found["versions"]["enabled"]


def test_the_command_prints_the_texts(findings: Demonstration, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, from the wheel: tests/repository/test_distributions.py."""
    monkeypatch.setattr(demo, "measure", lambda **_: findings)
    done = CliRunner().invoke(commands.app, ["demo"])
    assert done.exit_code == 0, done.stderr
    assert "!!!!!!!!" in done.stdout
    assert len(done.stdout.splitlines()) < 50


def test_saving_prints_json_where_that_is_asked(tmp_path: Path) -> None:
    """`demo --save X --json` printed nothing that a program could read."""
    done = CliRunner().invoke(commands.app, ["demo", "--save", str(tmp_path / "x"), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {"saved": str(tmp_path / "x")}


def test_a_missing_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(demo.CheckpointError, match="found no demo checkpoint in"):
        demo.measure(tmp_path)


def test_the_checkpoint_is_a_qwen2_of_its_own() -> None:
    """`!` is id 0, as in the real tokenizer, and the wheel stays small."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.CHECKPOINT)
    assert tokenizer.decode([0]) == "!"
    assert tokenizer.decode(tokenizer.encode("And it came to pass, café.")) == "And it came to pass, café."
    config = transformers.AutoConfig.from_pretrained(demo.CHECKPOINT)
    assert config.model_type == "qwen2"
    assert config.num_attention_heads > config.num_key_value_heads
    assert config.hidden_size // config.num_attention_heads == 64
    assert len(tokenizer) <= config.vocab_size
    assert sum(path.stat().st_size for path in demo.CHECKPOINT.iterdir()) < 6e6
    bias = loading.load(demo.CHECKPOINT, False, torch.float32, "sdpa").state_dict()
    for layer in (0, config.num_hidden_layers - 1):
        assert bias[f"model.layers.{layer}.self_attn.k_proj.bias"].abs().max() >= 280
