"""Models, prompts and measures that the files of the conformance suite share."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version

import qwen2_fp16_fix
from tests.helpers import kl_to
from tests.stress import KINDS, TINY, build, random_prompt

RELEASE = Version(Version(transformers.__version__).base_version)
TORCH = Version(Version(torch.__version__).base_version)
CACHE = "cache" if RELEASE >= Version("5.24") else "past_key_values"  # what a model calls its cache
DTYPE = "dtype" if RELEASE >= Version("4.56") else "torch_dtype"  # what from_pretrained calls it
#: Set by tools/torch_matrix.py: what takes long to compile is compiled once a torch version, not once a release.
COMPILES_ALL = "QWEN2_FP16_FIX_COMPILE" in os.environ
#: On a CPU. Before, torch's fused attention took its scores in float16 there.
SDPA_SCORES_ARE_FP32 = Version("2.5") <= TORCH
#: transformers' own masks for sdpa from 4.53 on write into an expanded tensor there, for windows and static caches.
SDPA_MASKS_RAISE = Version("2.5") > TORCH and Version("4.53") <= RELEASE
#: Every published magnitude at once, but for the two that cost accuracy instead of range.
ALL = tuple(kind for kind in KINDS if not kind.startswith("keys"))
ATTENTIONS = ("eager", "sdpa")
#: Those that can hide more than the future: a window, or what a prompt over a cache may not see.
MASKED_ATTENTIONS = ("eager",) if SDPA_MASKS_RAISE else ATTENTIONS
STRESSES = (("scores",), ("residual",), ("scores", "residual"), ("swiglu",), ALL)

PROMPT = random_prompt(TINY, batch=2, length=24)

#: KL to fp32, nats, mean over tokens. An ordinary model in fixed float16 is at 1e-6 here: 11 bits of mantissa in every
#: activation. A stressed one keeps that, since fp32 holds what float16 could not. Mask or position errors cost 1e-2.
CLOSE = 2e-5


def stress(kinds: tuple[str, ...] = (), attention: str = "eager", **settings: Any) -> Any:
    """A stock fp32 stress model; the same call gives the same weights."""
    return build(TINY, kinds, attn_implementation=attention, **settings)


def fixed_half(kinds: tuple[str, ...] = (), attention: str = "eager", **settings: Any) -> Any:
    """The same model fixed, in float16."""
    return qwen2_fp16_fix.fix(stress(kinds, attention, **settings).half())


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor = PROMPT, **inputs: Any) -> torch.Tensor:
    """Logits (B, S, vocabulary) as fp32."""
    found: torch.Tensor = model(input_ids=tokens, **inputs).logits
    return found.float()


def kl(oracle: torch.Tensor, found: torch.Tensor) -> float:
    """Mean over tokens of KL(oracle || found) in nats; both are logits (…, vocabulary) and must be finite."""
    assert torch.isfinite(found).all()
    return kl_to(oracle, found)


def static_cache(model: Any, batch: int = 2, length: int = 64) -> Any:
    """An empty StaticCache for `model`. Releases up to 4.55 fix its shape here."""
    sizes: dict[str, Any] = {"config": model.config, "max_cache_len": length}
    if RELEASE < Version("4.56"):
        name = "batch_size" if RELEASE < Version("4.46") else "max_batch_size"
        sizes |= {name: batch, "device": "cpu", "dtype": model.dtype}
    return transformers.StaticCache(**sizes)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Two ragged prompts, left-padded: tokens and mask (2, 24); the first row has 5 pads."""
    mask = torch.ones_like(PROMPT)
    mask[0, :5] = 0
    return PROMPT * mask, mask


def generate(model: Any, **how: Any) -> torch.Tensor:
    """Continuations (2, 8) of the two padded prompts."""
    tokens, mask = padded()
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            pad_token_id=0,
            min_new_tokens=8,
            max_new_tokens=8,
            **{"do_sample": False, **how},
        )
    found: torch.Tensor = out[:, tokens.shape[1] :]
    return found


def answer_of(command: Sequence[str], out: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """What a program of its own says about `request.json` in `out`, where it is started and leaves its files."""
    done = subprocess.run(
        [*command, str(out / "request.json")],
        cwd=out,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "out": out}


def expected_release() -> str | None:
    """The release the matrix meant to run, or None outside the matrix."""
    return os.environ.get("QWEN2_FP16_FIX_MATRIX")
