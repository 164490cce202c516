"""The scan names what the stress checkpoints have planted, in a folder, in memory and offloaded."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import qwen2_fp16_fix
from qwen2_fp16_fix.checkpoints.loading import forward, load
from qwen2_fp16_fix.patches.range_plan import FLOAT16_MAX
from qwen2_fp16_fix.report.page import page
from qwen2_fp16_fix.scanning import sentences
from qwen2_fp16_fix.scanning.result import ScanResult
from qwen2_fp16_fix.translations import SCAN_TEXTS
from tests import stress
from tests.scanning.planted import BREAKS, HALF, LAST, MASSIVE, PROMPT, SPIKED, site
from tests.stress import TINY, build

pytestmark = pytest.mark.xdist_group("scan")  # one worker builds the checkpoints, for all


@pytest.mark.parametrize("kind", BREAKS)
def test_stock_names_the_planted_layer_site_channel_and_token(scans: Callable[..., Any], kind: str) -> None:
    layer, name, channel, marker = BREAKS[kind]
    found = scans(kind)
    first = found.first_nonfinite
    assert (first.layer, first.site, first.where.channel) == (layer, name, channel)
    assert first.where.token_id == PROMPT[0, first.where.position]
    if marker is not None:
        assert first.where.token_id % stress.MARKER_PERIOD == marker
    assert first.largest > FLOAT16_MAX
    assert not found.finite
    said = f"layer {layer}, {sentences.site_name(name)}, "
    said += f"head {first.where.head}, " if name == "raw_scores" else ""
    said += f"channel {channel}, token {first.where.position} "
    said += sentences.token_name(first.where.token_id, chr(33 + first.where.token_id))
    assert said in found.verdict
    assert f"{first.largest:,.0f}" in found.verdict


@pytest.mark.parametrize("kind", MASSIVE)
def test_stock_names_planted_activations_that_float16_holds(scans: Callable[..., Any], kind: str) -> None:
    layer, channel, magnitude = MASSIVE[kind]
    found = scans(kind)
    assert found.finite
    top = found.massive_activations[0]
    assert (top.layer, top.where.channel) == (layer, channel)
    assert top.where.token_id % stress.MARKER_PERIOD == 1 + stress.MARKED.index(kind)
    assert top.magnitude == pytest.approx(magnitude, rel=0.06)
    assert (found.tightest.layer, found.tightest.where.channel) == (layer, channel)


@pytest.mark.parametrize("kind", [*SPIKED, "scores"])
def test_bias_spikes_are_listed(scans: Callable[..., Any], kind: str) -> None:
    """Both halves of a rotary pair where both are spiked, in the first and the last layer, and nothing else."""
    spikes = [spike for spike in scans(kind).bias_spikes if spike.projection == "k_proj"]
    pairs = SPIKED.get(kind, {HALF - 1})
    channels = {channel for pair in pairs for channel in (pair, pair + HALF)} if kind in SPIKED else pairs
    wanted = {(layer, head, c) for layer in (0, LAST) for head in range(TINY.kv_heads) for c in channels}
    assert {(spike.layer, spike.head, spike.channel) for spike in spikes} == wanted
    assert {spike.rotary_pair for spike in spikes} == pairs


def test_a_bias_past_float16_is_null_and_is_shown(tmp_path: Path) -> None:
    """Its infinity was no JSON: after the run, the files of a scan could not be written."""
    build(TINY, ("keys",)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.bias"][3] = -1e5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = qwen2_fp16_fix.scan(tmp_path, [[1, 2, 3]], device="cpu")
    top = json.loads(json.dumps(found.to_dict(), allow_nan=False))["bias_spikes"][0]
    assert (top["layer"], top["channel"], top["bias"], top["times_median"]) == (1, 3, None, None)
    for lang in sentences.LANGUAGES:
        Console(width=160).print(sentences.rendered(found, lang))
        assert SCAN_TEXTS[lang]["not_finite"] in next(
            sentence for sentence in sentences.consequences(found, lang) if "k_proj" in sentence
        )
        assert "<html" in page([found], lang=lang)


@pytest.mark.parametrize("kind", stress.KINDS)
def test_a_fixed_scan_of_planted_overflows_is_finite(scans: Callable[..., Any], kind: str) -> None:
    found = scans(kind, fixed=True)
    assert found.first_nonfinite is None
    assert found.finite
    assert found.past_limit == []
    assert found.certificate.proven
    assert site(found, 2, "residual").stored_as == "float32"


def test_a_healthy_checkpoint_is_finite_in_its_stock_form(folders: Callable[..., Path]) -> None:
    found = qwen2_fp16_fix.scan(folders(), [PROMPT], device="cpu")
    assert found.finite
    assert found.past_limit == []
    assert found.bias_spikes == found.massive_activations == ()


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kind", ["scores", "residual", "swiglu"])
def test_no_observation_passes_its_bound(scans: Callable[..., Any], kind: str, fixed: bool) -> None:
    bounded = [site for site in scans(kind, fixed).sites if site.bound is not None]
    assert len(bounded) == TINY.layers * 15 + 1
    for found in bounded:
        assert found.largest <= found.bound, (found.layer, found.site)


@pytest.mark.parametrize("kind", ["scores", "residual", "swiglu"])
def test_the_scores_of_a_fixed_model_are_its_own(
    scans: Callable[..., Any], folders: Callable[..., Path], kind: str
) -> None:
    """The first baddbmm of an attention is taken for them. Through sdpa they come from the query and the keys."""
    eager = scans(kind, True)
    fused = qwen2_fp16_fix.scan(folders(kind), [PROMPT], fixed=True, attention="sdpa", device="cpu")
    for layer in range(TINY.layers):
        for name in ("raw_scores", "scaled_scores"):
            expected = site(fused, layer, name).largest
            assert site(eager, layer, name).largest == pytest.approx(expected, rel=1e-2), (layer, name)


def test_the_earliest_site_over_all_prompts_comes_first(folders: Callable[..., Path]) -> None:
    """Prompt 1 breaks in layer 2 at down_proj, prompt 2 only at that layer's residual: neither order may decide it."""
    marked, plain = torch.tensor([[4, 50, 60]]), torch.tensor([[40, 50, 60]])
    assert 4 == 1 + stress.MARKED.index("moe57")
    folder = folders("residual", "swiglu")
    late, early = (torch.tensor([[1 + stress.MARKED.index(kind), 50, 60]]) for kind in ("residual", "swiglu"))
    for prompts in ([late, plain, early], [early, late, marked]):
        first = qwen2_fp16_fix.scan(folder, prompts, device="cpu").first_nonfinite
        assert (first.layer, first.site, first.where.token_id) == (2, "down_proj", int(early[0, 0]))
        assert prompts[first.where.prompt] is early
    first = qwen2_fp16_fix.scan(folder, [plain, late], device="cpu").first_nonfinite
    assert (first.layer, first.site, first.where.prompt) == (2, "residual", 1)


def comparable(found: ScanResult) -> list[Any]:
    """The sites without what needs a tokenizer or a certificate."""
    apart = ("token", "key_token", "bound")
    return [{key: value for key, value in site.to_dict().items() if key not in apart} for site in found.sites]


@pytest.mark.parametrize("fixed", [False, True])
def test_a_loaded_model_is_scanned_as_its_folder_is(folders: Callable[..., Path], fixed: bool) -> None:
    model = load(folders("residual"), fixed, torch.float16, "eager")
    found = qwen2_fp16_fix.scan(model, [PROMPT])
    assert comparable(found) == comparable(
        qwen2_fp16_fix.scan(folders("residual"), [PROMPT], fixed=fixed, device="cpu")
    )
    assert found.settings.fixed is fixed
    assert found.finite is fixed
    assert model.config._attn_implementation == "eager"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("fixed", [False, True])
def test_an_offloaded_model_is_scanned(folders: Callable[..., Path], tmp_path: Path, fixed: bool) -> None:
    """accelerate's hooks bring each weight in as its module runs; half of the layers wait on disk."""
    import accelerate

    model = load(folders("residual"), fixed, torch.float16, "eager")
    devices = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    devices |= {f"model.layers.{n}": "disk" if n % 2 else "cpu" for n in range(TINY.layers)}
    model = accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path)
    found = qwen2_fp16_fix.scan(model, [PROMPT])
    assert (found.first_nonfinite is None) is fixed
    if not fixed:  # the fix scales by token what it cannot bound, so its stored numbers differ
        layer, name, channel, _ = BREAKS["residual"]
        first = found.first_nonfinite
        assert (first.layer, first.site, first.where.channel) == (layer, name, channel)
        assert comparable(found) == comparable(qwen2_fp16_fix.scan(folders("residual"), [PROMPT], device="cpu"))


def test_through_sdpa_no_score_is_stored(folders: Callable[..., Path]) -> None:
    found = qwen2_fp16_fix.scan(folders("scores"), [PROMPT], attention="sdpa", device="cpu")
    assert found.finite
    assert site(found, 0, "raw_scores").largest > FLOAT16_MAX
    assert site(found, 0, "raw_scores").stored_as is None
    assert found.past_limit == []


def test_a_scan_reads_tied_embeddings_and_shards(tmp_path: Path) -> None:
    model = build(TINY, ("massive",), tie_word_embeddings=True).half()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = qwen2_fp16_fix.scan(tmp_path, [PROMPT], device="cpu")
    logits = forward(load(tmp_path, False, torch.float32, "eager"), PROMPT)
    assert site(found, None, "logits").largest == pytest.approx(float(logits.abs().max()), rel=1e-4)


def test_a_checkpoint_that_is_nan_everywhere_is_said_to_be(folders: Callable[..., Path], tmp_path: Path) -> None:
    """NaN among the weights is no overflow: no magnitude is made up for it."""
    tensors = load_file(folders("massive") / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 6] = math.nan
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders("massive") / name).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for fixed in (False, True):
        found = qwen2_fp16_fix.scan(tmp_path, [PROMPT], fixed=fixed, device="cpu")
        first = found.first_nonfinite
        assert (first.layer, first.site, first.where.channel, first.largest) == (1, "up", 5, None)
        assert "layer 1, up, channel 5, token 0" in found.verdict
        json.dumps(found.to_dict(), allow_nan=False)
        assert found.quantisation.keep_16_bit == (1, 2, 3)
        sentences.consequences(found)
