"""A Qwen2 so small that a self-test takes a second, which breaks stock float16 in each way the fix repairs.

Its weights are random but well behaved, and four things are built in:

- *Keys*: biases of q_proj and k_proj in the slowest rotary pair, whose product passes 65504. What the keys say in that
  pair is an eighth of the step that float16 has beside such a bias; once they are centred, the product is small too.
- *Scores*: in the last layer the biases are in a pair that turns away from any centre, by 0.075 radians a token: only
  fp32 holds the products. A token's own score is highest there by 36, which no rounding of its key reaches.
- *Residual*: one neuron a layer adds 25,000 to a channel at the marker token: no layer passes the limit alone, so none
  is scaled and nothing but the fp32 residual stream saves the sum.
- *SwiGLU*: in the last layer, act(gate)·up is 90,000 there; down_proj makes it small again.

A marker is a channel that the first token of the prompt fills and no other does. RMSNorm makes it √hidden, so a neuron
that reads it alone has a known activation there and none elsewhere. Once written, the massive channel is one as well.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..patches.modeling_qwen2_fp16 import ORIGINAL, stock_models

HIDDEN, LAYERS, HEADS, KEY_HEADS, INTERMEDIATE, VOCABULARY = 64, 4, 2, 1, 64, 64
HEAD_DIM = HIDDEN // HEADS
TOKENS = 64
MARKER, MASSIVE, QUIET = range(3)  # channels of the residual stream that nothing random writes to
GAIN = 2.0**-4  # of the norms in them: small, as in real models
KEY_SPIKE, QUERY_SPIKE = 300.0, 240.0
CONTENT = 2.0**-5  # of the keys beside their spike
TURNING_PAIR = 3
STEP, PRODUCT = 25_000.0, 90_000.0


def prompt() -> Tensor:
    """Token ids (1, TOKENS): the marker, id 1, and then others."""
    ids = torch.randint(2, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1), device="cpu")
    ids[0, 0] = 1
    return ids


def stock_model(attention: str) -> Any:
    """The stock model in fp32 on the CPU, in eval mode. Its weights are exact in float16, and the same every time."""
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
    # Constructors draw; a caller's seed is theirs.
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
    """Matrices scaled by their inputs, what writes to the residual stream a little smaller, norms near 1."""
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
    """A neuron with act(gate)·up of `product` where the channel `reads` fills the norm, and `written` in `writes`."""
    weight = math.sqrt(product) / (math.sqrt(HIDDEN) * GAIN)
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.weight[neuron] = 0
        projection.weight[neuron, reads] = weight
    mlp.down_proj.weight[:, neuron] = 0
    mlp.down_proj.weight[writes, neuron] = written / product
