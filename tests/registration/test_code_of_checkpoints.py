"""Code that a checkpoint brings along: built fixed or warned of, and said by every command."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import qwen2_fp16_fix
from qwen2_fp16_fix.verification import rows, verify
from tests.registration.models import PROMPT, OwnForward

OWN_CODE = """
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model as Stock, PreTrainedModel
from transformers.models.qwen2 import modeling_qwen2 as qwen2

class OwnModel(Stock):
    def forward(self, *args, **kwargs):
        self.__dict__["ran"] = True
        return super().forward(*args, **kwargs)

class OwnForCausalLM(Qwen2ForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)

class AlikeModel(PreTrainedModel):
    config_class = Qwen2Config
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(qwen2.Qwen2DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = qwen2.Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = qwen2.Qwen2RotaryEmbedding(config=config)
        self.post_init()
    def forward(self, input_ids):
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=self.rotary_emb(hidden, positions))
        return self.norm(hidden)

class ForeignModel(PreTrainedModel):
    config_class = Qwen2Config
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()
    def forward(self, input_ids):
        return self.norm(self.embed_tokens(input_ids))
"""
FIXED = {"OwnModel": True, "OwnForCausalLM": True, "AlikeModel": True, "ForeignModel": False}


def with_code(folder: Path, path: Path, name: str) -> Path:
    """The checkpoint with code of its own in its auto_map."""
    auto = "AutoModelForCausalLM" if name.endswith("LM") else "AutoModel"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "modeling_own.py").write_text(OWN_CODE)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"auto_map": {auto: f"modeling_own.{name}"}}))
    return path


@pytest.mark.parametrize("name", FIXED)
def test_a_checkpoints_own_code_loads_and_is_fixed_or_warned_of(name: str, folder: Path, tmp_path: Path) -> None:
    """From 5.5 a class registered from elsewhere goes before it: a bidirectional embedder became a causal Qwen2."""
    path = with_code(folder, tmp_path / f"own_{name}", name)
    auto = AutoModelForCausalLM if name.endswith("LM") else AutoModel
    with qwen2_fp16_fix.registered(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", qwen2_fp16_fix.NotFixedWarning)
        model = auto.from_pretrained(path, trust_remote_code=True, dtype=torch.float16, attn_implementation="eager")
        plain = AutoModel.from_pretrained(path)
    assert type(model).__name__ == name
    assert type(model).__module__.startswith("transformers_modules.")
    assert qwen2_fp16_fix.is_fixed(model) is FIXED[name]
    told = [one for one in said if issubclass(one.category, qwen2_fp16_fix.NotFixedWarning)]
    assert len(told) == (0 if FIXED[name] else 1)
    assert type(plain) is qwen2_fp16_fix.Qwen2Model  # without trust_remote_code its code does not run, as in stock
    with torch.no_grad():
        found = model(input_ids=PROMPT)
    found = found if isinstance(found, torch.Tensor) else found[0]
    assert torch.isfinite(found).all()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return with_code(Path(qwen2_fp16_fix.__file__).parent / "demo_checkpoint", tmp_path / "own_demo", "OwnModel")


def test_commands_say_that_they_looked_at_something_else(own: Path) -> None:
    """`certify` said Proven and `doctor` that all is well about a model that does not load."""
    found = qwen2_fp16_fix.certify(own)
    assert not found.proven
    assert "modeling_own.OwnModel" in found.verdict
    scanned = qwen2_fp16_fix.scan(own, [[5, 6, 7]])
    assert scanned.foreign_code == "modeling_own.OwnModel"
    assert "modeling_own.OwnModel" in scanned.verdict
    with pytest.raises(qwen2_fp16_fix.ExportError, match="OwnModel"):
        qwen2_fp16_fix.export(own, own.parent / "out")
    from qwen2_fp16_fix.diagnosis.checkpoint import examine

    assert [problem.code for problem in examine(own)[2]] == ["checkpoint.foreign_code"]


def test_verify_names_a_checkpoints_own_code(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "NEW_TOKENS", 1)
    monkeypatch.setattr(verify, "planned_rows", lambda device: [rows.ORACLE, rows.Row("float16", "eager", fixed=True)])
    found = qwen2_fp16_fix.verify(own, "And the LORD said unto Moses, go", window=8)
    assert not found.passed
    assert "modeling_own.OwnModel" in found.verdict


def test_a_loaded_model_with_a_forward_of_its_own_is_not_proven(source: Any) -> None:
    """The bounds are those of transformers' forward."""
    with qwen2_fp16_fix.registered():
        model = OwnForward(source.config).half()
    assert "OwnForward has a forward of its own, which is not bounded here" in qwen2_fp16_fix.certify(model).reasons
