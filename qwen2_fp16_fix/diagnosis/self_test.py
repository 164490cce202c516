"""The self-test: a tiny stock model overflows on a device in float16, and the fix repairs it or fails to.

The model takes a second to run and breaks stock float16 in each way that the fix repairs. Its weights are random but
well behaved, and four things are built in:

- *Keys*: biases of q_proj and k_proj in the slowest rotary pair, whose product exceeds 65,504. The rest of a key in
  that pair is an eighth of float16's step beside such a bias. Once keys are centred, the product is small too.
- *Scores*: in the last layer the biases are in a pair that turns away from any centre, by 0.075 radians a token. Only
  fp32 holds the products. A token's own score is highest there by 36, which no rounding of its key reaches.
- *Residual*: one neuron a layer adds 25,000 to a channel at the marker token. No layer alone exceeds the limit, so none
  is scaled, and only the fp32 residual stream holds the sum.
- *SwiGLU*: in the last layer act(gate)·up is 90,000 at the marker token. down_proj makes it small again.

A marker is a channel that only the first token of the prompt fills. RMSNorm makes it √hidden, so a neuron that reads it
alone has a known activation there and none elsewhere. The massive channel is such a marker once it is written.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from ..checkpoints.threads import one_thread
from ..progress import working
from ..results import Record
from ..verification.divergence import Divergence
from .devices import Device
from .remarks import Remark, in_words, remark

#: Nats, mean over tokens. Roundings of a whole fix cost 1.6e-7 here; keys that are not centred 2e-2, bfloat16 3e-5.
KL_LIMIT = 2e-6
ATTENTIONS = ("eager", "sdpa")
HIDDEN, LAYERS, HEADS, KEY_HEADS, INTERMEDIATE, VOCABULARY = 64, 4, 2, 1, 64, 64
HEAD_DIM = HIDDEN // HEADS
TOKENS = 64
MARKER, MASSIVE, QUIET = range(3)  # channels of the residual stream that nothing random writes to
GAIN = 2.0**-4  # of the norms in them: small, as in real models
KEY_SPIKE, QUERY_SPIKE = 300.0, 240.0
CONTENT = 2.0**-5  # of the keys beside their spike
TURNING_PAIR = 3
STEP, PRODUCT = 25_000.0, 90_000.0


@dataclass(frozen=True)
class SelfTestRow(Record):
    """The tiny model on a device in one way."""

    name: str
    fixed: bool
    finite: bool
    kl: float | None  # from stock fp32 eager, in nats


@dataclass(frozen=True)
class DeviceTest(Record):
    """The self-test on one device."""

    device: str
    rows: list[SelfTestRow]
    passed: bool
    text: str


@dataclass(frozen=True)
class SelfTests(Record):
    """The self-test on every device."""

    limit: float  # of the KL
    text: str
    results: list[DeviceTest]


class Outcome(NamedTuple):
    """The self-test on one device, before its sentence is in a language."""

    rows: list[SelfTestRow]
    passed: bool
    remark: Remark


def examine_with_self_test(
    hardware: Sequence[Device], language: str, progress: Console | None
) -> tuple[SelfTests, list[Remark], list[Remark]]:
    """The self-test on every device, failures as findings, and no warnings."""
    results, findings = [], []
    for device in hardware:
        with working(in_words(remark("self_test.runs", device=device.place), language), progress):
            outcome = self_test(device.place)
        if not outcome.passed:
            findings.append(outcome.remark)
        results.append(DeviceTest(device.place, outcome.rows, outcome.passed, in_words(outcome.remark, language)))
    text = in_words(remark("self_test.why" if hardware else "self_test.skipped"), language)
    return SelfTests(KL_LIMIT, text, results), findings, []


@one_thread()
def self_test(place: str) -> Outcome:
    """Runs stock and fixed float16 on the device that torch calls `place`, against stock fp32 eager on the CPU.

    It passes if stock is finite neither in eager nor in sdpa, and fixed is finite in both and within KL_LIMIT.
    """
    rows: list[SelfTestRow] = []
    try:
        from ..checkpoints.loading import quiet

        with quiet():
            oracle = _oracle()
            rows += [_row(place, fixed, attention, oracle) for fixed in (False, True) for attention in ATTENTIONS]
        return Outcome(rows, *judge(place, rows))
    except Exception as error:  # of a device, a driver or a backend: no error may end the diagnosis
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return Outcome(rows, False, remark("self_test.not_run", device=place, reason=reason))


def judge(place: str, rows: Sequence[SelfTestRow]) -> tuple[bool, Remark]:
    """Whether these rows show the overflow and its repair, and the sentence about it."""
    for row in rows:
        if not row.fixed and row.finite:
            return False, remark("self_test.not_reproduced", device=place, row=row.name)
        if row.fixed and not row.finite:
            return False, remark("self_test.not_finite", device=place, row=row.name)
        if row.fixed and not _kl_of(row) <= KL_LIMIT:
            kl, limit = f"{row.kl:.1e}", f"{KL_LIMIT:.0e}"
            return False, remark("self_test.not_close", device=place, row=row.name, kl=kl, limit=limit)
    largest = max(_kl_of(row) for row in rows if row.fixed)
    return True, remark("self_test.passed", device=place, kl=f"{largest:.1e}", limit=f"{KL_LIMIT:.0e}")


def _kl_of(row: SelfTestRow) -> float:
    return math.inf if row.kl is None else row.kl


@torch.no_grad()
def _oracle() -> Tensor:
    """Logits (TOKENS, vocabulary) of stock fp32 eager on the CPU, without autocast."""
    with torch.autocast("cpu", enabled=False):
        logits: Tensor = stock_model("eager")(input_ids=prompt()).logits[0]
    return logits.float()


@torch.no_grad()
def _row(place: str, fixed: bool, attention: str, oracle: Tensor) -> SelfTestRow:
    from ..in_place import fix

    model = stock_model(attention).half().to(place)
    if fixed:
        fix(model)
    logits = model(input_ids=prompt().to(place)).logits[0].float().cpu()
    finite = bool(torch.isfinite(logits).all())
    name = f"{'fixed' if fixed else 'stock'} float16 {attention}"
    return SelfTestRow(name, fixed, finite, _kl(logits, oracle) if finite else None)


def _kl(logits: Tensor, oracle: Tensor) -> float:
    divergence = Divergence()
    divergence.add(logits, oracle, oracle.argmax(-1))
    found = float(divergence.summary()["kl_mean"])
    return found if math.isfinite(found) else math.inf


def prompt() -> Tensor:
    """Token ids (1, TOKENS): the marker, id 1, and then others."""
    ids = torch.randint(2, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1), device="cpu")
    ids[0, 0] = 1
    return ids


def stock_model(attention: str) -> Any:
    """The stock model in fp32 on the CPU, in eval mode. Its weights are exact in float16 and the same every time."""
    from ..patches.modeling_qwen2_fp16 import STOCK  # raises for an unsupported transformers
    from ..patches.stock_wanted import stock_models

    config = STOCK.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=1024,
        rope_theta=1e6,
        tie_word_embeddings=False,
        use_cache=False,
    )
    # Constructors draw random numbers: fork, so that the caller's seed gives what it always gave.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), stock_models():
        model = STOCK.Qwen2ForCausalLM._from_config(config, attn_implementation=attention).float().eval()
    with torch.no_grad():
        _fill(model, torch.Generator().manual_seed(0))
        _spike_keys(model)
        _mark(model)
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


def _fill(model: nn.Module, generator: torch.Generator) -> None:
    """Random weights: matrices scaled by their inputs, half of that for o_proj and down_proj, norms near 1."""
    for name, parameter in model.named_parameters():
        parameter.normal_(generator=generator)
        if "norm" in name:
            parameter.mul_(0.1).add_(1)[: QUIET + 1] = GAIN
        elif parameter.ndim == 2 and "embed_tokens" not in name:
            parameter.mul_(1 / math.sqrt(parameter.shape[1]))
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(0.5)[: QUIET + 1] = 0


def _spike_keys(model: Any) -> None:
    for layer in model.model.layers:
        first = TURNING_PAIR if layer is model.model.layers[-1] else HEAD_DIM // 2 - 1
        pair = [first, first + HEAD_DIM // 2]
        query, key = layer.self_attn.q_proj, layer.self_attn.k_proj
        query.bias.view(HEADS, HEAD_DIM)[:, pair[0]] = QUERY_SPIKE
        key.bias.view(KEY_HEADS, HEAD_DIM)[:, pair[0]] = KEY_SPIKE
        key.weight.view(KEY_HEADS, HEAD_DIM, HIDDEN)[:, pair] *= CONTENT


def _mark(model: Any) -> None:
    embedding = model.model.embed_tokens.weight
    embedding[:, : QUIET + 1] = 0
    embedding[1, MARKER] = 16 * math.sqrt(HIDDEN)
    for number, layer in enumerate(model.model.layers[:-1]):
        _add_neuron(layer.mlp, 0, MARKER if number == 0 else MASSIVE, MASSIVE, product=256.0, written=STEP)
    _add_neuron(model.model.layers[-1].mlp, 0, MASSIVE, QUIET, product=PRODUCT, written=1024.0)


def _add_neuron(mlp: Any, neuron: int, reads: int, writes: int, product: float, written: float) -> None:
    """Gives a neuron act(gate)·up of `product` where the channel `reads` is filled. It adds `written` to `writes`."""
    weight = math.sqrt(product) / (math.sqrt(HIDDEN) * GAIN)
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.weight[neuron] = 0
        projection.weight[neuron, reads] = weight
    mlp.down_proj.weight[:, neuron] = 0
    mlp.down_proj.weight[writes, neuron] = written / product
