"""`qwen2-fp16-fix run` on whichever release is installed: an unchanged program records and says what it should."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qwen2_fp16_fix
from tests.conformance.models import CLOSE, DTYPE, PROMPT, answer_of, kl, stress
from tests.stress import TINY

pytestmark = pytest.mark.process
NAMES = ("AutoModelForCausalLM", "Qwen2ForCausalLM", "AutoModel", "Qwen2Model")
#: What the command line does with the words after `run --`; a matrix's environment has nothing to read it with.
RUN = "import sys; from qwen2_fp16_fix.launch import launcher; sys.exit(launcher.run(sys.argv[1:]))"
OWN_CODE = """
from transformers import Qwen2Model as Stock

class OwnModel(Stock):
    def forward(self, *args, **kwargs):
        self.__dict__["ran"] = True
        return super().forward(*args, **kwargs)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 checkpoint that breaks stock, and beside it the same with code of its own."""
    path: Path = tmp_path_factory.mktemp("run")
    stress(("scores", "residual")).half().save_pretrained(path / "plain")
    stress(("scores", "residual")).half().save_pretrained(path / "own")
    settings = json.loads((path / "own" / "config.json").read_text())
    settings["auto_map"] = {"AutoModel": "modeling_own.OwnModel"}
    (path / "own" / "config.json").write_text(json.dumps(settings))
    (path / "own" / "modeling_own.py").write_text(OWN_CODE)
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """What the program has found; what its models computed lies in `found["out"]`."""
    out = folder / "out"
    out.mkdir()
    request = {"tokens": PROMPT.tolist(), "folder": str(folder / "plain"), "own": str(folder / "own")}
    (out / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("load_under_run.py")
    package = str(Path(qwen2_fp16_fix.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(out / "modules")}
    return answer_of([sys.executable, "-c", RUN, sys.executable, str(script)], out, environment)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    """What stock fp32 computes from the checkpoint's float16 weights, with a head and without, and what it says."""
    how: dict[str, Any] = {"attn_implementation": "eager", DTYPE: torch.float32}
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder / "plain", **how).eval()
    with torch.no_grad():
        whole = model(input_ids=PROMPT, output_hidden_states=True, output_attentions=True)
        base = model.model(input_ids=PROMPT, output_hidden_states=True, output_attentions=True)
        said = model.generate(
            input_ids=PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            pad_token_id=0,
            min_new_tokens=8,
            max_new_tokens=8,
            do_sample=False,
        )
    return {"ForCausalLM": whole, "Model": base, "said": said[:, PROMPT.shape[1] :]}


def saved(found: dict[str, Any], way: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(found["out"] / f"{way}.pt")
    return loaded


def check(computed: dict[str, Any], expected: Any, head: str) -> None:
    """Finite, close to fp32, and with every hidden state and attention recorded."""
    assert len(computed["states"]) == TINY.layers + 1
    assert len(computed["attentions"]) == TINY.layers
    for mine, other in zip(computed["states"], expected.hidden_states, strict=True):
        assert torch.isfinite(mine).all()
        assert mine.shape == other.shape
        # relative to each token's length: 11 bits of mantissa, accumulated over the layers
        assert ((mine.float() - other).norm(dim=-1) / other.norm(dim=-1)).max() < 2e-2
    for mine, other in zip(computed["attentions"], expected.attentions, strict=True):
        torch.testing.assert_close(mine.float(), other, atol=2e-2, rtol=0)  # keys of 302 have a float16 step of 0.25
    if head == "ForCausalLM":
        assert kl(expected.logits, computed["output"].float()) < CLOSE


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_fixed_and_records(name: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Names that were rebound made transformers file what it records under another class: None, in any dtype."""
    head = "ForCausalLM" if name.endswith("LM") else "Model"
    way = f"{name} float16"
    check(saved(found, way), expected[head], head)
    assert (found[way]["class"], found[way]["module"]) == (f"Qwen2{head}", "transformers.models.qwen2.modeling_qwen2")
    if head == "ForCausalLM":
        assert found[way]["said"] == expected["said"].tolist()
    assert found["transformers"] == transformers.__version__


@pytest.mark.parametrize("name", NAMES)
def test_fp32_is_stocks_bit_for_bit_and_records(name: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    head = "ForCausalLM" if name.endswith("LM") else "Model"
    computed = saved(found, f"{name} float32")
    assert torch.equal(computed["output"], expected[head][0])
    for mine, other in (("states", "hidden_states"), ("attentions", "attentions")):
        pairs = zip(computed[mine], getattr(expected[head], other), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_names_stay_what_they_are(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Rebinding broke pickles of models, and isinstance."""
    assert found["isinstance"]
    check(saved(found, "pickled"), expected["ForCausalLM"], "ForCausalLM")


def test_a_checkpoints_own_code_runs(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """From 5.5 a class that is registered from elsewhere goes before it."""
    assert (found["own"]["class"], found["own"]["own"]) == ("OwnModel", True)
    check(saved(found, "own"), expected["Model"], "Model")
