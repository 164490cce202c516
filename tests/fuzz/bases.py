"""What is damaged: a small healthy checkpoint, whole and in shards, its export, and what the commands write."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen2_fp16_fix.demo import CHECKPOINT
from tests.fuzz.worker import call

VOCABULARY = 1024  # that of the demo's tokenizer
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
INDEX = "model.safetensors.index.json"


@functools.cache
def home() -> Path:
    """The folder of what is made once; removed when this process ends."""
    path = Path(tempfile.mkdtemp(prefix="qwen2-fp16-fix-fuzz-bases-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def tensors() -> dict[str, torch.Tensor]:
    """The weights of the checkpoint, in float16, large enough for every site to hold something."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return {name: tensor.half() for name, tensor in model.state_dict().items()}


@functools.cache
def config() -> str:
    """Its config.json."""
    found: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SIZES}
    found |= {"torch_dtype": "float16", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu"}
    found |= {"tie_word_embeddings": False, "use_sliding_window": False, "attention_dropout": 0.0}
    return json.dumps(found, indent=1)


@functools.cache
def healthy() -> Path:
    """In one file."""
    path = home() / "healthy"
    path.mkdir()
    (path / "config.json").write_text(config())
    save_file(tensors(), path / "model.safetensors", {"format": "pt"})
    for name in TOKENIZER:
        shutil.copyfile(CHECKPOINT / name, path / name)
    return path


@functools.cache
def sharded() -> Path:
    """In two shards with an index."""
    path = Path(shutil.copytree(healthy(), home() / "sharded"))
    (path / "model.safetensors").unlink()
    where: dict[str, str] = {}
    for number in (1, 2):
        name = f"model-{number:05}-of-00002.safetensors"
        part = {key: tensors()[key] for key in sorted(tensors())[number - 1 :: 2]}
        save_file(part, path / name, {"format": "pt"})
        where |= dict.fromkeys(part, name)
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}, indent=1))
    return path


@functools.cache
def exported() -> Path:
    """What `export` makes of it."""
    _must("export", str(healthy()), str(home() / "exported"), "--weights", "copy")
    return home() / "exported"


@functools.cache
def lock() -> Path:
    """What `lock` writes."""
    path = home() / "lock.json"
    _must("lock", "-o", str(path))
    return path


@functools.cache
def certificate() -> Path:
    """What `certify --json` prints."""
    return _printed("certificate.json", "certify", str(healthy()), "--json")


@functools.cache
def verification() -> Path:
    """What `verify --json` prints; `resume` is written beside it."""
    resume = str(home() / "resume.json")
    return _printed("verification.json", "verify", str(healthy()), "--tokens", "16", "--resume", resume, "--json")


@functools.cache
def resume() -> Path:
    """The finished rows of a verification."""
    verification()
    return home() / "resume.json"


@functools.cache
def scan() -> Path:
    """What `scan --output` writes."""
    path = home() / "scan.json"
    call("scan", str(healthy()), "--tokens", "4", "--output", str(path))
    assert path.is_file()
    return path


@functools.cache
def prompts() -> Path:
    """Prompts for a scan."""
    path = home() / "prompts.json"
    path.write_text(json.dumps(["What is the capital of France?", "def factors(n):"]))
    return path


def placed(base: Path, folder: Path, name: str = "checkpoint") -> Path:
    """A copy of a base that an input may change. A file is copied, too."""
    target = folder / name
    return Path(shutil.copytree(base, target) if base.is_dir() else shutil.copyfile(base, target))


def _must(*arguments: str) -> str:
    code, out, err = call(*arguments)
    assert code in (0, 1), err
    return out


def _printed(name: str, *arguments: str) -> Path:
    path = home() / name
    path.write_text(_must(*arguments))
    return path
