"""What the scan measures is what a plain run has, a layer at a time, and watching changes no number."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import qwen2_fp16_fix
from qwen2_fp16_fix.activations import extremes
from qwen2_fp16_fix.activations.extremes import Extremes, ScoreExtremes
from qwen2_fp16_fix.activations.layerwise import LayerwiseRun
from qwen2_fp16_fix.activations.sites import Attended
from qwen2_fp16_fix.activations.weights_on_demand import ModelOnDisk
from qwen2_fp16_fix.certification.result import Certificate, LayerCertificate
from qwen2_fp16_fix.checkpoints.folder import FolderSource
from qwen2_fp16_fix.checkpoints.loading import forward, load
from qwen2_fp16_fix.scanning.measurements import Measurements
from qwen2_fp16_fix.scanning.quantisation import CacheLoss, RoundingLoss
from tests import stress
from tests.scanning.planted import LAST, PROMPT
from tests.stress import TINY, build

pytestmark = pytest.mark.xdist_group("scan")  # one worker builds the checkpoints, for all


@pytest.mark.parametrize("kind", stress.KINDS)
def test_magnitudes_are_those_of_a_plain_fp32_run(scans: Callable[..., Any], kind: str) -> None:
    """Measured apart: the stress model's own hooks, on the model as it was built, in fp32 eager."""
    found = scans(kind)
    peaks = stress.peaks(build(TINY, (kind,), attn_implementation="eager"), PROMPT)
    names = {"scores": "raw_scores", "act_up": "product", "down": "down_proj"}
    for peak, name in names.items():
        largest = max(site.largest for site in found.sites if site.site == name)
        assert largest == pytest.approx(peaks[peak], rel=1e-4)
    residuals = [site.largest for site in found.sites if site.site.startswith(("residual", "embedding"))]
    assert max(residuals) == pytest.approx(peaks["residual"], rel=1e-4)


@pytest.mark.parametrize(("fixed", "full"), [(False, False), (False, True), (True, False)])
def test_running_by_layer_and_watching_changes_no_number(folders: Callable[..., Path], fixed: bool, full: bool) -> None:
    """Bit for bit what the model itself computes, in each arithmetic: a look that rounds or writes is no look."""
    folder = folders("keys", "massive")
    disk = ModelOnDisk(folder, FolderSource(folder), fixed, "eager", torch.device("cpu"))
    prompts, measured = [PROMPT, PROMPT[:, 5:19]], Measurements()
    with disk.embedding():
        run = LayerwiseRun(disk, prompts, full_precision=full)
    measured.start(run)
    for number, layer in enumerate(disk.base.layers):
        with disk.layer(number):
            measured.step(run, number, layer)
    with disk.end():
        logits = [next(run.logits(run.normed(index)))[1] for index in range(len(prompts))]
    model = load(folder, fixed, torch.float32 if full else torch.float16, "sdpa" if full else "eager")
    for own, tokens in zip(logits, prompts, strict=True):
        assert torch.equal(own, forward(model, tokens))


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


LAYER = LayerCertificate(0, {}, {}, {}, False, {}, False, [])
EMPTY_CERTIFICATE = Certificate(
    proven=False,
    verdict="",
    reasons=[],
    assumes=[],
    layers=[LAYER] * TINY.layers,
    logits=None,
    casting={},
    scaled_layers=0,
    max_exponent=0,
    config={"head_dim": 32},
    seconds=0.0,
)


def test_a_broken_float16_run_ends_and_each_key_head_is_measured_once(
    folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float16 run of NaN costs minutes and says nothing; stock hands its attention each key head several times."""
    steps: list[tuple[bool, int]] = []
    heads: set[int] = set()
    plain_step, plain_on_attention = LayerwiseRun.step, Measurements.on_attention

    def step(self: LayerwiseRun, number: int, around: Any) -> None:
        steps.append((self.full_precision, number))
        plain_step(self, number, around)

    def on_attention(self: Measurements, attended: Attended) -> None:
        heads.add(attended.key.shape[1])
        plain_on_attention(self, attended)

    monkeypatch.setattr(LayerwiseRun, "step", step)
    monkeypatch.setattr(Measurements, "on_attention", on_attention)
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
    stock, fixed = (scans("keys", fixed).quantisation.cache for fixed in (False, True))
    for layer in (0, LAST):
        assert stock[layer].keys.int8 > 0.3 > 0.02 > fixed[layer].keys.int8
        assert stock[layer].score_error.int8 > 10 * fixed[layer].score_error.int8
    assert stock[1].keys.int8 < 0.02
