"""A watch hands over every site of a layer once, in the order of execution, and a row of another model is enough."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

import qwen2_fp16_fix
from qwen2_fp16_fix.activations.sites import SCORES, SITES, Attended, SitePlace, Watch, execution_order
from qwen2_fp16_fix.patches.architecture import QWEN2, Part, Site
from tests.stress import TINY, build, random_prompt

PROMPT = random_prompt(TINY, batch=1, length=12)


def watched(model: Any, row: Any = QWEN2) -> tuple[dict[int, list[str]], list[Attended]]:
    """The sites of each layer as they were handed over, and what the attentions were."""
    order: dict[int, list[str]] = defaultdict(list)
    attentions: list[Attended] = []

    def on_site(place: SitePlace, tensor: Tensor) -> None:
        assert place.layer is not None
        assert tensor.numel()
        order[place.layer].append(place.site)

    layers = dict(enumerate(model.get_submodule("model").layers))
    with torch.no_grad(), Watch(layers, on_site, attentions.append, row):
        model(input_ids=PROMPT, use_cache=False)
    return order, attentions


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fixed", [False, True])
def test_every_site_of_every_layer_is_seen_once_in_order(fixed: bool, attention: str) -> None:
    """Scores are there where eager stores them: raw in stock, scaled in fixed. Query and key are always."""
    model = build(TINY, (), attn_implementation=attention).half()
    if fixed:
        qwen2_fp16_fix.fix(model)
    stored = {SCORES["scaled" if fixed else "raw"]} if attention == "eager" else set()
    order, attentions = watched(model)
    expected = [site for site in SITES if site not in set(SCORES.values()) - stored]
    assert order == dict.fromkeys(range(TINY.layers), expected)
    assert [each.layer for each in attentions] == list(range(TINY.layers))
    for each in attentions:
        assert each.key.shape[1] == TINY.kv_heads
        assert each.query.shape[1] == TINY.heads


def test_the_hooks_are_taken_off() -> None:
    model = build(TINY, ())
    watched(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_another_row_is_watched_by_what_it_says() -> None:
    """Qwen3 has a norm for the heads of q and of k: two more sites, and no line of the watch."""
    from transformers.models.qwen3 import modeling_qwen3 as modeling

    sites: list[Site] = []
    for site in QWEN2.sites:
        sites.append(site)
        if site.name in ("q", "k"):
            sites.append(Site(f"{site.name}_norm", f"{site.name}_norm output", f"self_attn.{site.name}_norm:output"))
    norms = tuple(
        Part(f"layers.*.self_attn.{name}", "Qwen3RMSNorm", "norm", width="head") for name in ("q_norm", "k_norm")
    )
    row = QWEN2._replace(base="Qwen3Model", parts=QWEN2.parts + norms, sites=tuple(sites))
    config = modeling.Qwen3Config(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_implementation="eager",
    )
    order, _ = watched(modeling.Qwen3ForCausalLM(config).eval(), row)
    assert sorted(order[0]) == sorted(site.name for site in row.watched_sites() if site.name != SCORES["scaled"])
    assert {*order[0]} - {*SITES} == {"q_norm", "k_norm"}
    assert order[0] == order[1]


def test_places_sort_as_they_are_computed() -> None:
    ends = [SitePlace(None, site) for site in ("embedding", "final_norm", "logits")]
    places = [ends[0], *(SitePlace(layer, site) for layer in (0, 1) for site in SITES), *ends[1:]]
    assert sorted(reversed(places), key=execution_order) == places
    assert [str(places[0]), str(places[1]), str(places[-1])] == [
        "embedding",
        "layer 0, input_layernorm output",
        "logits",
    ]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_keys_in_two_parts_are_handed_over_as_one(attention: str) -> None:
    """What is measured on them is what a quantised cache would lose, and that takes heads of head_dim channels."""
    model = qwen2_fp16_fix.fix(build(TINY, ("keys_fast",), attn_implementation=attention).half())
    _, attentions = watched(model)
    assert qwen2_fp16_fix.status(model).model.ranges[0].pairs_in_two_parts
    assert {each.shape[-1] for attended in attentions for each in (attended.query, attended.key)} == {TINY.head_dim}
