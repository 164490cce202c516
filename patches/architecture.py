"""What a decoder layer is made of, one row per model: its parts, its linears, and the sites where float16 can overflow.

A site is a tensor that a layer computes, under a name of its own: "down_proj" is the output of the last linear.

All code about a layer reads such a row: what is exchanged (`parts`), what is bounded and read from a checkpoint
(`linears`), what is watched in a running model (`sites`), and the classes that are built around it (`heads`).
The names are those of transformers' modules and so of a checkpoint; the shapes are those of `nn.Linear.weight`.
This file imports neither torch nor transformers. Classes are looked up only when they are needed, and compared as
objects, not by name: qwen2_vl of transformers 4.48, for one, defines a Qwen2RMSNorm of its own.

B is the batch, S the tokens, D = head_dim, H and G the query and key heads.
"""

import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple

LAYER = "layers.*"  # below a base model; `*` is the number of the layer

Role = Literal["norm", "rotary", "layer", "attention", "mlp"]


class Part(NamedTuple):
    """A module that decides the numerics of a model, and the stock class that it must be of."""

    path: str  # below the base model: "norm", "layers.*.mlp"
    stock: str  # the name of its class in the row's module
    role: Role  # which class of patches/ fixes it
    width: str = ""  # of a norm: the size of its gain, as in `Linear.rows`
    optional: bool = False  # whether some release lacks it

    @property
    def below_layer(self) -> str | None:
        """The path below a layer, "self_attn.rotary_emb", and "" for the layer itself; None outside of layers."""
        if self.path == LAYER:
            return ""
        return self.path.removeprefix(f"{LAYER}.") if self.path.startswith(f"{LAYER}.") else None


class Linear(NamedTuple):
    """A matrix product of a layer: (B, S, columns) to (B, S, rows), with a weight (rows, columns) and a bias (rows,).

    Sizes go by name: "hidden"; "queries", H·D; "keys", G·D; "head", D; "intermediate".
    """

    name: str  # below the layer, as in a checkpoint: "self_attn.k_proj"
    rows: str
    columns: str
    reads: str  # the site that is its input
    writes: str  # the site that is its output
    bias: bool = False  # whether stock gives it a bias, which the bounds then cover

    @property
    def owner(self) -> str:
        """The part of the layer that holds it: "self_attn"."""
        return self.name.rpartition(".")[0]


class Site(NamedTuple):
    """A tensor that a layer computes, (B, S, a size) unless noted otherwise, in units of the values themselves."""

    name: str
    title: str  # what messages call it
    at: str | None  # "self_attn.q_proj:output", "mlp.down_proj:input", ":output" (of the layer), "scores:raw"
    bound: str | None = None  # the field of LayerBounds (range_bounds.py); None where the fix computes it in fp32
    limit: Literal["sum", "number"] = "sum"  # what is bounded: the magnitudes of a sum, or one number that is stored
    exponent: str | None = None  # the field of Exponents by which a fixed layer scales it
    seen_scaled: bool = False  # whether hooks get it scaled; if not, they get what stock's get
    stock_bound: str | None = None  # the field of LayerBounds of what stock stores and hooks get, if it is another

    @property
    def module(self) -> str | None:
        """The module, by its path below the layer, that has this tensor as its input or output; None if none has."""
        path, _, side = (self.at or "").partition(":")
        return path if side in ("input", "output") else None

    @property
    def seen_bound(self) -> str | None:
        """The field of LayerBounds that bounds what stock stores and hooks get."""
        return self.stock_bound or self.bound

    @property
    def is_input(self) -> bool:
        """Whether it is the input of `module`, and not its output."""
        return str(self.at).endswith(":input")


class Head(NamedTuple):
    """A class that transformers builds around the base model."""

    suffix: str  # what its name ends in: "ForCausalLM"; "Model" for the base model itself
    weight: str | None  # of its output layer, as in a checkpoint; None where it has no output layer
    since: str  # the first release that has it

    @property
    def auto_class(self) -> str:
        """The Auto class that builds it: "AutoModelForCausalLM"."""
        return f"AutoModel{self.suffix.removeprefix('Model')}"


class AttentionCall(NamedTuple):
    """The arguments of an attention's forward, in one order for all models."""

    hidden_states: Any  # (B, S, hidden)
    position_embeddings: Any  # cos and sin, (B, S, D) each
    attention_mask: Any
    cache: Any
    others: dict[str, Any]


def qwen2_arguments(
    hidden_states: Any, position_embeddings: Any, attention_mask: Any = None, cache: Any = None, **others: Any
) -> AttentionCall:
    """The arguments as Qwen2's attention takes them from transformers 4.48 on, whatever a release calls the cache."""
    for name in ("past_key_value", "past_key_values"):  # to 4.55, to 5.23
        cache = others.pop(name, cache)
    return AttentionCall(hidden_states, position_embeddings, attention_mask, cache, others)


class Architecture(NamedTuple):
    """One model: where its classes are, and what its layers are made of."""

    module: str  # of its classes
    base: str  # the class of the model without a head
    model_types: tuple[str, ...]  # in config.json
    since: str  # the first release that has it
    parts: tuple[Part, ...]  # as they are checked, one after the other
    linears: tuple[Linear, ...]  # as they are computed
    sites: tuple[Site, ...]  # as they are computed
    heads: tuple[Head, ...]
    arguments: Callable[..., AttentionCall] = qwen2_arguments

    def path(self, role: Role) -> str:
        """Where a layer has its only part of that role: "self_attn" for "attention"."""
        (path,) = (part.below_layer for part in self.parts if part.role == role and part.below_layer)
        return path

    def stock_name(self, role: Role) -> str:
        """The name of the stock class of that role: "Qwen2Attention" for "attention"."""
        return next(part.stock for part in self.parts if part.role == role)

    def final_norm(self) -> str:
        """The norm after the last layer, by its path below the base model."""
        return next(part.path for part in self.parts if part.role == "norm" and part.below_layer is None)

    def norms(self) -> dict[str, str]:
        """The norms of a layer, by their paths below it, and the sizes of their gains."""
        return {part.below_layer: part.width for part in self.parts if part.role == "norm" and part.below_layer}

    def shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The shape of every weight of a layer, and of a bias for each linear, by its name below the layer.

        sizes: by the names that `Linear` lists. A linear is listed with a bias even if stock gives it none.
        """
        found: dict[str, tuple[int, ...]] = {f"{norm}.weight": (sizes[width],) for norm, width in self.norms().items()}
        for linear in self.linears:
            rows, columns = sizes[linear.rows], sizes[linear.columns]
            found |= {f"{linear.name}.weight": (rows, columns), f"{linear.name}.bias": (rows,)}
        return found

    def owners(self) -> tuple[str, ...]:
        """The parts of a layer that hold its linears."""
        return tuple(dict.fromkeys(linear.owner for linear in self.linears))

    def linear(self, site: str) -> Linear:
        """The linear whose output is at that site."""
        return next(linear for linear in self.linears if linear.writes == site)

    def fed_by(self, site: str) -> tuple[Linear, ...]:
        """The linears whose input is at that site."""
        return tuple(linear for linear in self.linears if linear.reads == site)

    def site(self, name: str) -> Site:
        """The site of that name."""
        return next(site for site in self.sites if site.name == name)

    def gain(self, site: str) -> str:
        """The weight of the norm whose output is at that site: "input_layernorm.weight"."""
        path = self.site(site).module
        if path not in self.norms():
            raise KeyError(f"{site} is not the output of a norm")
        return f"{path}.weight"

    def watched_sites(self) -> tuple[Site, ...]:
        """The sites that can be seen in a running model, in the order of execution."""
        return tuple(site for site in self.sites if site.at is not None)

    def scaled_bounds(self) -> dict[str, str]:
        """The bounds that an exponent lowers, and the exponent's name."""
        return {site.bound: site.exponent for site in self.sites if site.bound and site.exponent}

    def scaled_owners(self) -> dict[str, str]:
        """For each exponent that scales the output of a part's last linear, that part of the layer."""
        written = ((self.site(linear.writes), linear.owner) for linear in self.linears)
        return {site.exponent: owner for site, owner in written if site.exponent and site.seen_scaled}

    def output_layers(self) -> tuple[str, ...]:
        """The modules that its heads end in, each once: "lm_head"."""
        return tuple(dict.fromkeys(head.weight.rpartition(".")[0] for head in self.heads if head.weight))


QWEN2 = Architecture(
    module="transformers.models.qwen2.modeling_qwen2",
    base="Qwen2Model",
    model_types=("qwen2", "qwen2_fp16"),  # the second is a strict export's
    since="4.37.0",
    parts=(
        Part("norm", "Qwen2RMSNorm", "norm", width="hidden"),
        Part("rotary_emb", "Qwen2RotaryEmbedding", "rotary", optional=True),  # from 4.45
        Part("layers.*", "Qwen2DecoderLayer", "layer"),
        Part("layers.*.self_attn", "Qwen2Attention", "attention"),
        Part("layers.*.self_attn.rotary_emb", "Qwen2RotaryEmbedding", "rotary", optional=True),  # to 4.47
        Part("layers.*.mlp", "Qwen2MLP", "mlp"),
        Part("layers.*.input_layernorm", "Qwen2RMSNorm", "norm", width="hidden"),
        Part("layers.*.post_attention_layernorm", "Qwen2RMSNorm", "norm", width="hidden"),
    ),
    linears=(
        Linear("self_attn.q_proj", "queries", "hidden", reads="input_norm", writes="q", bias=True),
        Linear("self_attn.k_proj", "keys", "hidden", reads="input_norm", writes="k", bias=True),
        Linear("self_attn.v_proj", "keys", "hidden", reads="input_norm", writes="v", bias=True),
        Linear("self_attn.o_proj", "hidden", "queries", reads="attention", writes="o_proj"),
        Linear("mlp.gate_proj", "intermediate", "hidden", reads="post_norm", writes="gate"),
        Linear("mlp.up_proj", "intermediate", "hidden", reads="post_norm", writes="up"),
        Linear("mlp.down_proj", "hidden", "intermediate", reads="product", writes="down_proj"),
    ),
    sites=(
        Site("input_norm", "input_layernorm output", "input_layernorm:output", "input_norm", "number", "input_norm"),
        Site("q", "q_proj output", "self_attn.q_proj:output", "q", exponent="input_norm", stock_bound="biased_q"),
        Site("k", "k_proj output", "self_attn.k_proj:output", "k", exponent="input_norm", stock_bound="biased_k"),
        Site("v", "v_proj output", "self_attn.v_proj:output", "v", exponent="input_norm", stock_bound="value"),
        Site("value", "values", None, "value", exponent="o_proj"),  # (B, G, S, D): v with its bias, as it is stored
        Site("rotated", "rotated queries and keys", None, "rotated", "number", "rotated"),  # (B, H or G, S, D)
        Site("raw_scores", "raw scores q·k", "scores:raw"),  # (B, H, S, keys): stock's, before they are scaled
        Site("scaled_scores", "scaled scores", "scores:scaled"),
        Site("attention", "attention output", "self_attn.o_proj:input", "attention", "sum", "o_proj", seen_scaled=True),
        Site("o_proj", "o_proj output", "self_attn.o_proj:output", "o_proj", "sum", "o_proj", seen_scaled=True),
        Site("residual_attention", "residual stream after attention", "post_attention_layernorm:input"),
        Site(
            "post_norm",
            "post_attention_layernorm output",
            "post_attention_layernorm:output",
            "post_norm",
            "number",
            "post_norm",
        ),
        Site("gate", "gate_proj output", "mlp.gate_proj:output", "gate", exponent="post_norm"),
        Site("up", "up_proj output", "mlp.up_proj:output", "up", exponent="post_norm"),
        Site("product", "SwiGLU product", "mlp.down_proj:input", "product", "number", "mlp", seen_scaled=True),
        Site("down_proj", "down_proj output", "mlp.down_proj:output", "down_proj", "sum", "mlp", seen_scaled=True),
        Site("residual", "residual stream", ":output"),
    ),
    heads=(
        Head("Model", None, since="4.37.0"),
        Head("ForCausalLM", "lm_head.weight", since="4.37.0"),
        Head("ForSequenceClassification", "score.weight", since="4.37.0"),
        Head("ForTokenClassification", "score.weight", since="4.42.0"),
        Head("ForQuestionAnswering", "qa_outputs.weight", since="4.46.1"),
    ),
)

ROWS = (QWEN2,)


@cache
def roles_by_class(row: Architecture) -> dict[type, Role]:
    """The stock class of each part of a row, and its role. Imports the row's module."""
    module = import_module(row.module)
    return {getattr(module, part.stock): part.role for part in row.parts}


def row_of(kind: type, rows: tuple[Architecture, ...] = ROWS) -> tuple[Architecture, Role] | None:
    """The row and the role of a stock class of a part, or of a class derived from one; None for any other class.

    Imports nothing: as long as a module is not imported, no class derives from one of its classes.
    """
    known = [(row, roles_by_class(row)) for row in rows if row.module in sys.modules]
    return next(((row, roles[base]) for base in kind.__mro__ for row, roles in known if base in roles), None)
