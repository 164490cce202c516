"""The scan: it names what the stress checkpoints have planted, and measures what a plain run has, a layer at a time."""

import copy
import json
import math
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import qwen2_fp16_fix
from qwen2_fp16_fix import demo, translations
from qwen2_fp16_fix.activations import extremes
from qwen2_fp16_fix.activations.extremes import Extremes, ScoreExtremes
from qwen2_fp16_fix.activations.layerwise import LayerwiseRun
from qwen2_fp16_fix.activations.sites import Attended
from qwen2_fp16_fix.activations.weights_on_demand import ModelOnDisk
from qwen2_fp16_fix.checkpoints.folder import FolderSource
from qwen2_fp16_fix.cli import commands as cli
from qwen2_fp16_fix.patches.range_plan import FLOAT16_MAX
from qwen2_fp16_fix.report import files as scan_files
from qwen2_fp16_fix.report import page as report
from qwen2_fp16_fix.scanning import prompts as scan_inputs
from qwen2_fp16_fix.scanning import sentences as wording
from qwen2_fp16_fix.scanning.measurements import Survey
from qwen2_fp16_fix.scanning.quantisation import CacheLoss, RoundingLoss
from tests.stress import models as stress
from tests.stress.models import TINY, build, random_prompt

pytestmark = pytest.mark.xdist_group("scan")  # one worker builds the checkpoints, for all

PROMPT = random_prompt(TINY, 1, 48, seed=7) % 90  # which the tokenizer below has letters for
HALF = TINY.head_dim // 2
LAST = TINY.layers - 1
#: Where stress.py breaks float16 by construction: layer, site, channel, and the token id that carries the marker.
BREAKS: dict[str, tuple[int, str, int, int | None]] = {
    "scores": (0, "raw_scores", HALF - 1, None),
    "residual": (2, "residual", 1, 1 + stress.MARKED.index("residual")),
    "swiglu": (2, "down_proj", 3, 1 + stress.MARKED.index("swiglu")),
}
#: Where the kinds that stay finite have their largest down_proj output.
MASSIVE = {"massive": (2, 1, 11_885.0), "moe57": (2, 1, 50_000.0)}
#: Channels of a head that hold the spikes of the kinds that only lose accuracy.
SPIKED = {"keys": {HALF - 2}, "keys_fast": {int(0.75 * HALF), int(0.625 * HALF)}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Stress checkpoints by their kinds, each built once, with a tokenizer."""
    built: dict[tuple[str, ...], Path] = {}

    def folder(*kinds: str) -> Path:
        if kinds not in built:
            built[kinds] = tmp_path_factory.mktemp("-".join(kinds) or "plain")
            build(TINY, kinds).half().save_pretrained(built[kinds])
            write_tokenizer(built[kinds])
        return built[kinds]

    return folder


def write_tokenizer(folder: Path) -> None:
    """Token 0 is `!`, as in the real tokenizer, and every printable ASCII letter is a token."""
    model = {"type": "BPE", "vocab": {chr(33 + number): number for number in range(94)}, "merges": []}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    parts = {"model": model, "pre_tokenizer": level, "decoder": level, "version": "1.0", "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    own = demo.CHECKPOINT / "tokenizer_config.json"
    (folder / "tokenizer_config.json").write_bytes(own.read_bytes())


def text_of(ids: Tensor) -> str:
    return "".join(chr(33 + number) for number in ids.flatten().tolist())


@pytest.fixture(scope="module")
def scans(folders: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """Scans by kind, each made once."""
    made: dict[tuple[str, bool], dict[str, Any]] = {}

    def scan(kind: str, fixed: bool = False) -> dict[str, Any]:
        if (kind, fixed) not in made:
            made[kind, fixed] = qwen2_fp16_fix.scan(folders(kind), text_of(PROMPT), fixed=fixed, device="cpu")
        return made[kind, fixed]

    return scan


def site(found: dict[str, Any], layer: int | None, name: str) -> dict[str, Any]:
    return next(site for site in found["sites"] if (site["layer"], site["site"]) == (layer, name))


@pytest.mark.parametrize("kind", BREAKS)
def test_stock_names_the_planted_layer_site_channel_and_token(scans: Callable[..., Any], kind: str) -> None:
    layer, name, channel, marker = BREAKS[kind]
    found = scans(kind)
    first = found["first_nonfinite"]
    assert (first["layer"], first["site"], first["channel"]) == (layer, name, channel)
    assert first["token_id"] == PROMPT[0, first["position"]]
    if marker is not None:
        assert first["token_id"] % stress.MARKER_PERIOD == marker
    assert first["largest"] > FLOAT16_MAX
    assert not found["finite"]
    said = f"layer {layer}, {wording.site_name(name)}, "
    said += f"head {first['head']}, " if name == "raw_scores" else ""
    said += f"channel {channel}, token {first['position']} "
    said += wording.token_name(first["token_id"], chr(33 + first["token_id"]))
    assert said in found["verdict"]
    assert f"{first['largest']:,.0f}" in found["verdict"]


@pytest.mark.parametrize("kind", MASSIVE)
def test_stock_names_planted_activations_that_float16_holds(scans: Callable[..., Any], kind: str) -> None:
    layer, channel, magnitude = MASSIVE[kind]
    found = scans(kind)
    assert found["finite"]
    top = found["massive_activations"][0]
    assert (top["layer"], top["channel"]) == (layer, channel)
    assert top["token_id"] % stress.MARKER_PERIOD == 1 + stress.MARKED.index(kind)
    assert top["magnitude"] == pytest.approx(magnitude, rel=0.06)
    assert (wording.tightest(found)["layer"], wording.tightest(found)["channel"]) == (layer, channel)


@pytest.mark.parametrize("kind", [*SPIKED, "scores"])
def test_bias_spikes_are_listed(scans: Callable[..., Any], kind: str) -> None:
    """Both halves of a rotary pair where both are spiked, in the first and the last layer, and nothing else."""
    spikes = [spike for spike in scans(kind)["bias_spikes"] if spike["projection"] == "k_proj"]
    pairs = SPIKED.get(kind, {HALF - 1})
    channels = {channel for pair in pairs for channel in (pair, pair + HALF)} if kind in SPIKED else pairs
    wanted = {(layer, head, c) for layer in (0, LAST) for head in range(TINY.kv_heads) for c in channels}
    assert {(spike["layer"], spike["head"], spike["channel"]) for spike in spikes} == wanted
    assert {spike["rotary_pair"] for spike in spikes} == pairs


def test_a_bias_past_float16_is_null_and_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its infinity was no JSON: after the run, the files of a scan could not be written."""
    build(TINY, ("keys",)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.bias"][3] = -1e5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = qwen2_fp16_fix.scan(tmp_path, [[1, 2, 3]], device="cpu")
    top = json.loads(json.dumps(found, allow_nan=False))["bias_spikes"][0]
    assert (top["layer"], top["channel"], top["bias"], top["times_median"]) == (1, 3, None, None)
    for lang in wording.LANGUAGES:
        wording.render(found, wording.Console(width=160), lang)
        assert translations.SCAN_TEXTS[lang]["not_finite"] in next(
            sentence for sentence in wording.consequences(found, lang) if "k_proj" in sentence
        )
        assert "<html" in report.page([found], lang=lang)


@pytest.mark.parametrize("kind", stress.KINDS)
def test_fixed_finds_nothing(scans: Callable[..., Any], kind: str) -> None:
    found = scans(kind, fixed=True)
    assert found["first_nonfinite"] is None
    assert found["finite"]
    assert wording.passing(found) == []
    assert found["certificate"]["proven"]
    assert site(found, 2, "residual")["stored_as"] == "float32"


def test_a_healthy_checkpoint_is_finite_in_its_stock_form(folders: Callable[..., Path]) -> None:
    found = qwen2_fp16_fix.scan(folders(), [PROMPT], device="cpu")
    assert found["finite"]
    assert wording.passing(found) == found["bias_spikes"] == found["massive_activations"] == []


@pytest.mark.parametrize("kind", stress.KINDS)
def test_magnitudes_are_those_of_a_plain_fp32_run(scans: Callable[..., Any], kind: str) -> None:
    """Measured apart: the stress model's own hooks, on the model as it was built, in fp32 eager."""
    found = scans(kind)
    peaks = stress.peaks(build(TINY, (kind,), attn_implementation="eager"), PROMPT)
    names = {"scores": "raw_scores", "act_up": "product", "down": "down_proj"}
    for peak, name in names.items():
        largest = max(site["largest"] for site in found["sites"] if site["site"] == name)
        assert largest == pytest.approx(peaks[peak], rel=1e-4)
    streams = [site["largest"] for site in found["sites"] if site["site"].startswith(("residual", "embedding"))]
    assert max(streams) == pytest.approx(peaks["residual"], rel=1e-4)


@pytest.mark.parametrize(("fixed", "full"), [(False, False), (False, True), (True, False)])
def test_walking_and_watching_change_nothing(folders: Callable[..., Path], fixed: bool, full: bool) -> None:
    """Bit for bit what the model itself computes, in each arithmetic: a look that rounds or writes is no look."""
    folder = folders("keys", "massive")
    disk = ModelOnDisk(folder, FolderSource(folder), fixed, "eager", torch.device("cpu"))
    prompts, survey = [PROMPT, PROMPT[:, 5:19]], Survey()
    with disk.embedding():
        stream = LayerwiseRun(disk, prompts, full_precision=full)
    survey.start(stream)
    for number, layer in enumerate(disk.base.layers):
        with disk.layer(number):
            stream.step(number, lambda prompt, number=number, layer=layer: survey.watching(number, layer, prompt))
        survey.close(number)
    with disk.end():
        logits = [next(stream.logits(stream.normed(index)))[1] for index in range(len(prompts))]
    model = demo.load(folder, fixed, torch.float32 if full else torch.float16, "sdpa" if full else "eager")
    for own, tokens in zip(logits, prompts, strict=True):
        assert torch.equal(own, demo.forward(model, tokens))


def test_one_layer_is_in_memory_at_a_time_and_each_tensor_is_read_once(
    folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes a checkpoint larger than memory possible."""
    reads: list[str] = []
    plain_read, plain_step = FolderSource.read, LayerwiseRun.step

    def read(self: FolderSource, name: str) -> Tensor:
        reads.append(name)
        return plain_read(self, name)

    def step(self: LayerwiseRun, number: int, around: Any) -> None:
        real = {name for name, weight in self.provider.base.named_parameters() if not weight.is_meta}
        assert {name.partition(".self")[0].partition(".mlp")[0] for name in real if "norm" not in name} == {
            f"layers.{number}"
        }
        plain_step(self, number, around)

    monkeypatch.setattr(FolderSource, "read", read)
    monkeypatch.setattr(LayerwiseRun, "step", step)
    monkeypatch.setattr("qwen2_fp16_fix.scanning.scan.certify", lambda *_: EMPTY_CERTIFICATE)
    qwen2_fp16_fix.scan(folders("massive"), [PROMPT, PROMPT[:, :9]], device="cpu")
    assert len(reads) == len(set(reads)) == len(load_file(folders("massive") / "model.safetensors"))


EMPTY_CERTIFICATE: dict[str, Any] = {
    "proven": False, "verdict": "", "scaled_layers": 0, "max_exponent": 0, "logits": None, "config": {"head_dim": 32},
    "layers": [{"bounds": {}, "exponents": {}, "stock_headroom_bits": {}}] * TINY.layers,
}  # fmt: skip


def test_what_broke_is_not_run_on_and_keys_are_measured_once(
    folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float16 stream of NaN costs minutes and says nothing; stock hands its attention each key head several times."""
    steps: list[tuple[bool, int]] = []
    heads: set[int] = set()
    plain_step, plain_attend = LayerwiseRun.step, Survey.attend

    def step(self: LayerwiseRun, number: int, around: Any) -> None:
        steps.append((self.full_precision, number))
        plain_step(self, number, around)

    def attend(self: Survey, attended: Attended) -> None:
        heads.add(attended.key.shape[1])
        plain_attend(self, attended)

    monkeypatch.setattr(LayerwiseRun, "step", step)
    monkeypatch.setattr(Survey, "attend", attend)
    qwen2_fp16_fix.scan(folders("scores"), [PROMPT], device="cpu")
    assert steps == [(False, 0), *((True, number) for number in range(TINY.layers))]
    assert heads == {TINY.kv_heads}


def test_scores_are_measured_in_blocks_and_are_the_direct_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor larger than a block is made; magnitude, place and subnormal share are those of the whole product."""
    monkeypatch.setattr(extremes, "BLOCK", 2000)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 6, 90, 8, generator=generator), torch.randn(1, 2, 90, 8, generator=generator)
    query[:, :, :, 3] *= 40
    query[:, 3:] *= 3  # so that the largest is in a head of the second key head
    query[0, 4, 33:50] *= 2.0**-12
    found = ScoreExtremes()
    with Largest() as sizes:
        found.add(Attended(0, query, key, 8**-0.5), prompt=2)
    assert sizes.found <= max(2000, query.numel())
    whole = (query @ key.repeat_interleave(3, dim=1).transpose(2, 3)).abs()[0]
    assert found.raw.largest == pytest.approx(float(whole.max()), rel=1e-6)
    assert found.scaled.largest == pytest.approx(float(whole.max()) * 8**-0.5, rel=1e-6)
    head, row, column = (int(index) for index in (whole == whole.max()).nonzero()[0])
    spot = found.raw.spot
    assert spot is not None
    assert (spot.prompt, spot.head, spot.position, spot.key_position, spot.channel) == (2, head, row, column, 3)
    assert found.raw.numbers == whole.numel()
    assert found.scaled.subnormal == int((whole * 8**-0.5 < 2.0**-14).sum()) > found.raw.subnormal > 0


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made meanwhile."""

    found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.untyped_storage().size():
            self.found = max(self.found, made.numel())
        return made


def test_extremes_are_the_direct_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extremes, "BLOCK", 20)
    tensor = torch.randn(1, 9, 7, generator=torch.Generator().manual_seed(1))
    tensor[0, 2:4, :3] = torch.tensor([0.0, 2.0**-15, -(2.0**-20)])
    tensor[0, 6, 5] = -50.0
    found = Extremes()
    found.add(tensor, prompt=1)
    assert (found.largest, found.numbers, found.subnormal, found.subnormal_share) == (50, 63, 4, 4 / 63)
    assert found.spot == extremes.TokenPlace(1, 6, 5)
    for odd in (math.nan, math.inf, -math.inf):
        tensor[0, 7, 1] = odd
        found.add(tensor, prompt=3)
        assert found.spot == extremes.TokenPlace(3, 7, 1)
        assert not found.finite
        found = Extremes()


def test_rounding_losses_are_the_direct_formulas() -> None:
    """Against whole tensors: the loss of the median channel, and what a softmax sees of rounded keys."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(50, 9, generator=generator)
    rows[:, 4] += 300
    rows[:, 7] = 0
    loss = RoundingLoss(127)
    loss.add(rows[:30][None])
    loss.add(rows[30:][None])
    scale = rows.abs().amax(-1, keepdim=True) / 127
    error = (rows / scale).round() * scale - rows
    channels = [float(error[:, c].norm() / rows[:, c].norm()) for c in range(9) if c != 7]
    assert loss.summary().median == pytest.approx(sorted(channels)[(len(channels) - 1) // 2], rel=1e-5)
    assert loss.summary().outlier_ratio == pytest.approx(float(rows.abs().amax(0).max() / rows.abs().amax(0).median()))

    query, key = torch.randn(1, 4, 70, 8, generator=generator), torch.randn(1, 2, 70, 8, generator=generator)
    cache = CacheLoss()
    cache.add_scores(Attended(0, query, key, 0.5))
    total, count = 0.0, 0
    for head in range(4):
        exact = key[0, head // 2]
        scale = exact.abs().amax(-1, keepdim=True) / 7
        moved = query[0, head] @ ((exact / scale).round() * scale - exact).T * 0.5
        for position in range(70 - 64, 70):
            seen = moved[position, : position + 1]
            total, count = total + float((seen - seen.mean()).square().sum()), count + len(seen)
    assert cache.score_summary()["int4"] == pytest.approx(math.sqrt(total / count), rel=1e-4)


def test_a_cache_of_centred_keys_survives_int8(scans: Callable[..., Any]) -> None:
    """The finding that the report shows: beside a spike stock's keys are lost, the fix's are not."""
    stock, fixed = (scans("keys", fixed)["quantisation"]["cache"] for fixed in (False, True))
    for layer in (0, LAST):
        assert stock[layer]["keys"]["int8"] > 0.3 > 0.02 > fixed[layer]["keys"]["int8"]
        assert stock[layer]["score_error"]["int8"] > 10 * fixed[layer]["score_error"]["int8"]
    assert stock[1]["keys"]["int8"] < 0.02


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kind", ["scores", "residual", "swiglu"])
def test_no_observation_passes_its_bound(scans: Callable[..., Any], kind: str, fixed: bool) -> None:
    bounded = [site for site in scans(kind, fixed)["sites"] if site["bound"] is not None]
    assert len(bounded) == TINY.layers * 15 + 1
    for found in bounded:
        assert found["largest"] <= found["bound"], (found["layer"], found["site"])


def test_the_earliest_site_over_all_prompts_comes_first(folders: Callable[..., Path]) -> None:
    """Prompt 1 breaks in layer 2 at down_proj, prompt 2 only at that layer's residual: neither order may decide it."""
    marked, plain = torch.tensor([[4, 50, 60]]), torch.tensor([[40, 50, 60]])
    assert 4 == 1 + stress.MARKED.index("moe57")
    folder = folders("residual", "swiglu")
    late, early = (torch.tensor([[1 + stress.MARKED.index(kind), 50, 60]]) for kind in ("residual", "swiglu"))
    for prompts in ([late, plain, early], [early, late, marked]):
        first = qwen2_fp16_fix.scan(folder, prompts, device="cpu")["first_nonfinite"]
        assert (first["layer"], first["site"], first["token_id"]) == (2, "down_proj", int(early[0, 0]))
        assert prompts[first["prompt"]] is early
    first = qwen2_fp16_fix.scan(folder, [plain, late], device="cpu")["first_nonfinite"]
    assert (first["layer"], first["site"], first["prompt"]) == (2, "residual", 1)


def comparable(found: dict[str, Any]) -> list[Any]:
    return [[{k: v for k, v in s.items() if k not in ("token", "key_token", "bound")} for s in found["sites"]]]


@pytest.mark.parametrize("fixed", [False, True])
def test_a_loaded_model_is_scanned_as_its_folder_is(folders: Callable[..., Path], fixed: bool) -> None:
    model = demo.load(folders("residual"), fixed, torch.float16, "eager")
    found = qwen2_fp16_fix.scan(model, [PROMPT])
    assert comparable(found) == comparable(
        qwen2_fp16_fix.scan(folders("residual"), [PROMPT], fixed=fixed, device="cpu")
    )
    assert found["settings"]["fixed"] is fixed
    assert found["finite"] is fixed
    assert model.config._attn_implementation == "eager"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("fixed", [False, True])
def test_an_offloaded_model_is_scanned(folders: Callable[..., Path], tmp_path: Path, fixed: bool) -> None:
    """accelerate's hooks bring each weight in as its module runs; half of the layers wait on disk."""
    accelerate = pytest.importorskip("accelerate")
    model = demo.load(folders("residual"), fixed, torch.float16, "eager")
    devices = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    devices |= {f"model.layers.{n}": "disk" if n % 2 else "cpu" for n in range(TINY.layers)}
    model = accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path)
    found = qwen2_fp16_fix.scan(model, [PROMPT])
    assert (found["first_nonfinite"] is None) is fixed
    if not fixed:  # the fix scales by token what it cannot bound, so its stored numbers differ
        layer, name, channel, _ = BREAKS["residual"]
        first = found["first_nonfinite"]
        assert (first["layer"], first["site"], first["channel"]) == (layer, name, channel)
        assert comparable(found) == comparable(qwen2_fp16_fix.scan(folders("residual"), [PROMPT], device="cpu"))


def test_through_sdpa_no_score_is_stored(folders: Callable[..., Path]) -> None:
    found = qwen2_fp16_fix.scan(folders("scores"), [PROMPT], attention="sdpa", device="cpu")
    assert found["finite"]
    assert site(found, 0, "raw_scores")["largest"] > FLOAT16_MAX
    assert site(found, 0, "raw_scores")["stored_as"] is None
    assert wording.passing(found) == []


def test_tied_embeddings_and_shards(tmp_path: Path) -> None:
    model = build(TINY, ("massive",), tie_word_embeddings=True).half()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = qwen2_fp16_fix.scan(tmp_path, [PROMPT], device="cpu")
    logits = demo.forward(demo.load(tmp_path, False, torch.float32, "eager"), PROMPT)
    assert site(found, None, "logits")["largest"] == pytest.approx(float(logits.abs().max()), rel=1e-4)


def test_a_checkpoint_that_is_nan_everywhere_is_said_to_be(folders: Callable[..., Path], tmp_path: Path) -> None:
    """NaN among the weights is no overflow: no magnitude is made up for it."""
    tensors = load_file(folders("massive") / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 6] = math.nan
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders("massive") / name).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for fixed in (False, True):
        found = qwen2_fp16_fix.scan(tmp_path, [PROMPT], fixed=fixed, device="cpu")
        first = found["first_nonfinite"]
        assert (first["layer"], first["site"], first["channel"], first["largest"]) == (1, "up", 5, None)
        assert "layer 1, up, channel 5, token 0" in found["verdict"]
        json.dumps(found, allow_nan=False)
        assert found["quantisation"]["keep_16_bit"] == [1, 2, 3]
        wording.consequences(found)


def test_findings_are_json_and_are_rendered_in_both_languages(
    scans: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, fixed in (("scores", False), ("swiglu", False), ("massive", False), ("keys", True)):
        found = scans(kind, fixed)
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        for lang in wording.LANGUAGES:
            wording.render(found, wording.Console(width=160), lang)
            assert " ".join(wording.verdict(found, lang).split()) in " ".join(capsys.readouterr().out.split())
    assert "All of them are raw scores" in " ".join(wording.consequences(scans("scores")))


def test_a_token_that_is_markup_to_rich_is_printed_as_it_stands(
    scans: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer with a token `[/INST]` ended in rich's MarkupError, after the run; `[b]` was swallowed."""
    found = copy.deepcopy(scans("scores"))
    for token in ("[/INST]", "[b]"):
        for each in found["sites"]:
            each["token"] = token
        wording.render(found, wording.Console(width=200))
        assert f"`{token}`" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_after_all_costs_no_verdict(
    folders: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may fill during the run: what was found is printed all the same."""

    def fail(*_: object) -> None:
        raise qwen2_fp16_fix.ScanError("the disk is full.")

    monkeypatch.setattr(scan_files.ScanFiles, "write", fail)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("AB")
    done = command(folders("keys"), "--prompts", prompts, "--json", tmp_path / "scan.json")
    assert isinstance(done.exception, qwen2_fp16_fix.ScanError)
    assert "tightest" in done.stdout


def test_both_languages_have_the_same_keys_and_placeholders() -> None:
    def fields(text: str) -> set[str | None]:
        return {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}

    english, chinese = (translations.SCAN_TEXTS[lang] for lang in ("en", "zh"))
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert fields(text) == fields(chinese[key]), key
        assert chinese[key].strip(), key


def test_every_text_is_used() -> None:
    """A text that nothing shows is one that nobody keeps true."""
    package = Path(translations.__file__).parent
    sources = "".join(
        file.read_text(encoding="utf-8")
        for pattern in ("report/**/*", "scanning/*.py", "activations/*.py")
        for file in package.glob(pattern)
        if file.suffix in (".py", ".html", ".js", ".css")
    )
    for key in translations.SCAN_TEXTS["en"]:
        name = re.sub(r"^(site|column|term|what|verdict)_", "", key).removesuffix("_text")
        assert re.search(rf"\b{name}\b|_{name}\b", sources), key


# --- the command ---

RUNNER = CliRunner()


def command(*arguments: object) -> Any:
    return RUNNER.invoke(cli.app, ["scan", "--device", "cpu", *map(str, arguments)])


def test_the_command_names_what_was_planted_and_its_exit_code_says_so(
    folders: Callable[..., Path], tmp_path: Path
) -> None:
    prompts, data = tmp_path / "prompts.txt", tmp_path / "scan.json"
    prompts.write_text(f"{text_of(PROMPT)}\n\nAB\n")
    done = command(folders("swiglu"), "--prompts", prompts, "--stock", "--json", data)
    assert done.exit_code == 1, done.output
    assert re.search(r"breaks first in layer 2, down_proj, channel 3,\s+token \d+\s+`.`", done.stdout)
    found = json.loads(data.read_text())
    assert found.keys() == {"stock"}
    assert [prompt["tokens"] for prompt in found["stock"]["prompts"]] == [48, 2]
    done = command(folders("swiglu"), "--prompts", prompts, "--fixed", "--lang", "zh")
    assert done.exit_code == 0, done.output
    assert "修复后 float16（eager）" in done.stdout


def test_errors_are_one_sentence_on_stderr(python: Callable[..., Any], tmp_path: Path) -> None:
    done = python("-m", "qwen2_fp16_fix", "scan", str(tmp_path / "no"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("qwen2-fp16-fix: there is no ")
    assert len(done.stderr.splitlines()) == 1


def refused(*arguments: object) -> str:
    done = command(*arguments)
    assert isinstance(done.exception, qwen2_fp16_fix.Qwen2FP16FixError), (done.exception, done.output)
    assert "\n" not in str(done.exception)
    return str(done.exception)


@pytest.fixture
def never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test whose bad input is noticed only after the run."""
    monkeypatch.setattr("qwen2_fp16_fix.scanning.scan.walk", lambda *_: pytest.fail("the run before the check"))


@pytest.mark.usefixtures("never_run")
def test_bad_files_are_refused_before_the_run_and_are_not_touched(
    folders: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, there = folders("scores"), tmp_path / "there.html"
    there.write_text("mine")
    assert "there.html exists: name another file, or add --force" in refused(folder, "--report", there)
    assert there.read_text() == "mine"
    assert "cannot be written (No such file" in refused(folder, "--json", tmp_path / "no" / "x.json")
    assert "is a folder: name a file in it" in refused(folder, "--png", tmp_path)
    assert "cannot be written (Not a directory" in refused(folder, "--json", there / "x.json")
    with monkeypatch.context() as later:
        later.setattr(Path, "is_dir", lambda path: False)  # as from Python 3.14
        later.setattr(Path, "exists", lambda path: False)
        assert "cannot be written (File name too long" in refused(folder, "--json", tmp_path / ("x" * 300))
    both = tmp_path / "one"
    assert "have the same name" in refused(folder, "--json", both, "--report", both)
    assert "add --report OUT.html" in refused(folder, "--verification", there)
    report = tmp_path / "out.html"
    for content in (
        "mine",
        "[]",
        '{"rows": [], "settings": {}}',
        '{"rows": [{}], "settings": {"tokens": 1, "window": 1}}',
    ):
        there.write_text(content)
        assert "holds no result of verify" in refused(folder, "--report", report, "--verification", there)
    monkeypatch.setattr(scan_files.importlib.util, "find_spec", lambda name: None)
    wanted = 'needs plotly and jinja2: run pip install "qwen2-fp16-fix[report]"'
    assert wanted in refused(folder, "--report", report)
    assert "--png needs matplotlib" in refused(folder, "--png", report)
    assert not report.exists()


def test_force_overwrites_and_a_failed_write_leaves_the_old_file(
    folders: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, prompts = tmp_path / "scan.json", tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["AB\nC"]))
    data.write_text("old")
    assert command(folders("keys"), "--prompts", prompts, "--json", data, "--force").exit_code == 0
    written = data.read_text()
    assert json.loads(written)["stock"]["prompts"] == [{"text": "AB\nC", "tokens": 3}]

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    sentence = refused(folders("keys"), "--prompts", prompts, "--json", data, "--force")
    assert "No space left on device" in sentence
    assert data.read_text() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.json", "scan.json"]


def test_a_name_that_is_just_short_enough_is_written(folders: Callable[..., Path], tmp_path: Path) -> None:
    """The longer name that it had while it was written was one too long: a refusal after the run."""
    data, prompts = tmp_path / ("n" * 250), tmp_path / "prompts.txt"
    prompts.write_text("AB")
    assert command(folders("keys"), "--prompts", prompts, "--json", data).exit_code == 0
    assert json.loads(data.read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([data.name, prompts.name])


@pytest.mark.usefixtures("never_run")
def test_bad_prompts_and_checkpoints_are_one_sentence(folders: Callable[..., Path], tmp_path: Path) -> None:
    folder, prompts = folders("scores"), tmp_path / "prompts.json"
    assert "cannot be read (No such file" in refused(folder, "--prompts", tmp_path / "no.txt")
    for content, sentence in (
        (b"caf\xe9", "is not UTF-8"),
        (b"[", "is not valid JSON"),
        (b'{"a": 1}', "is not a list of texts"),
        (b"[]", "holds no prompt"),
        (b'["\\ud83d and \\ude00"]', "a surrogate without its other half"),
        (b'["a", " "]', "holds no prompt, or an empty one"),
    ):
        prompts.write_bytes(content)
        assert sentence in refused(folder, "--prompts", prompts)
    assert "the meta device computes nothing" in refused(folder, "--device", "meta")
    (tmp_path / "empty.txt").write_text(" \n")
    good = tmp_path / "good.txt"
    good.write_text("ABC")
    assert "holds no prompt" in refused(folder, "--prompts", tmp_path / "empty.txt")
    assert "0 tokens of a prompt leave nothing" in refused(folder, "--tokens", "0")
    assert "is no device here" in refused(folder, "--device", "warp", "--prompts", good)
    bare = tmp_path / "bare"
    bare.mkdir()
    assert "has no config.json" in refused(bare)
    (bare / "config.json").write_text('{"model_type": "llama"}')
    assert "of type 'llama', not 'qwen2'" in refused(bare)
    (bare / "config.json").write_bytes((folder / "config.json").read_bytes())
    (bare / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert "has no tokenizer: copy tokenizer.json" in refused(bare)
    error = qwen2_fp16_fix.CheckpointError
    with pytest.raises(error, match="token 500, but the model's vocabulary ends at 127"):
        qwen2_fp16_fix.scan(bare, [[500]])
    with pytest.raises(qwen2_fp16_fix.ScanError, match="a prompt has no tokens"):
        qwen2_fp16_fix.scan(bare, [[]])
    with pytest.raises(qwen2_fp16_fix.ScanError, match="is no attention to scan"):
        qwen2_fp16_fix.scan(bare, [[5]], attention="flash")


def test_models_that_cannot_be_scanned_as_asked_are_refused(folders: Callable[..., Path]) -> None:
    error = qwen2_fp16_fix.ScanError
    model = demo.load(folders("scores"), False, torch.float16, "eager")
    with pytest.raises(error, match=r"is stock, not as asked: call fix\(model\) first"):
        qwen2_fp16_fix.scan(model, [PROMPT], fixed=True)
    with pytest.raises(error, match="a text needs a tokenizer"):
        qwen2_fp16_fix.scan(model, "A")
    with pytest.raises(qwen2_fp16_fix.CheckpointError, match="this model is float32: load it in float16"):
        qwen2_fp16_fix.scan(model.float(), [PROMPT])
    with pytest.raises(qwen2_fp16_fix.NotQwen2Error):
        qwen2_fp16_fix.scan(torch.nn.Linear(2, 2), [PROMPT])


def test_a_fixed_scan_of_nothing_fixed_is_refused(
    folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN2_FP16_FIX", "0")
    with pytest.raises(qwen2_fp16_fix.ScanError, match="switches the fix off"):
        qwen2_fp16_fix.scan(folders("scores"), [PROMPT], fixed=True)


@pytest.mark.usefixtures("never_run")
@pytest.mark.parametrize("asked", ["--report", "--png"])
def test_a_switched_off_fix_is_noticed_before_stock_runs(
    asked: str, folders: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report is of both: stock ran to its end, and then fixed was refused and nothing written."""
    monkeypatch.setenv("QWEN2_FP16_FIX", "0")
    assert "QWEN2_FP16_FIX=0" in refused(folders("scores"), asked, tmp_path / "out")


def test_the_mark_at_the_beginning_of_a_text_is_no_part_of_it(tmp_path: Path) -> None:
    """Windows writes it, and it was the first token of the first prompt."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("\ufeffAB\nC".encode())
    assert scan_inputs.read_prompts(prompts) == ["AB", "C"]


def test_texts_go_through_the_chat_template(folders: Callable[..., Path]) -> None:
    """Position 0 of a chat is where massive activations sit: a scan of bare texts would miss the real prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders("scores"))
    tokenizer.chat_template = "<{{ messages[0]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    found = qwen2_fp16_fix.scan(folders("scores"), "AB", tokenizer=tokenizer, device="cpu")
    assert found["prompts"] == [{"text": "AB", "tokens": 4}]
    assert {site["token"] for site in found["sites"]} <= set("<AB>")
