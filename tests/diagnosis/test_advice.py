"""The doctor says how to run a Qwen2 on every kind of device."""

import contextlib
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qwen2_fp16_fix
from qwen2_fp16_fix.demo import CHECKPOINT
from qwen2_fp16_fix.diagnosis import advice, devices, doctor, remarks
from qwen2_fp16_fix.diagnosis.devices import Device
from qwen2_fp16_fix.translations import DOCTOR_TEXTS
from tests.diagnosis.examples import CPU, codes, nvidia


@pytest.mark.parametrize(
    ("device", "way", "reason"),
    [
        (nvidia("Tesla V100-SXM2-32GB", 7, 0), "fixed float16", "no_bfloat16"),
        (nvidia("Tesla T4", 7, 5), "fixed float16", "no_bfloat16"),
        (nvidia("NVIDIA GeForce RTX 2080 Ti", 7, 5), "fixed float16", "no_bfloat16"),
        (nvidia("Tesla P100-PCIE-16GB", 6, 0), "fixed float16", "no_bfloat16"),
        (nvidia("NVIDIA GeForce GTX 1080 Ti", 6, 1), "fixed float16", "slow_float16"),
        (nvidia("NVIDIA A100-SXM4-80GB", 8, 0), "bfloat16", "native_bfloat16"),
        (nvidia("NVIDIA H100", 9, 0), "bfloat16", "native_bfloat16"),
        (nvidia("a card of tomorrow", 12, 0), "bfloat16", "native_bfloat16"),
        (nvidia("NVIDIA A100", 8, 0)._replace(torch_denies_bfloat16=True), "fixed float16", "no_bfloat16"),
        (Device("rocm", "cuda:0", "AMD Instinct MI250X", architecture="gfx90a"), "bfloat16", "native_bfloat16"),
        (Device("rocm", "cuda:0", "AMD Radeon RX 7900 XTX", architecture="gfx1100"), "bfloat16", "native_bfloat16"),
        (Device("rocm", "cuda:0", "AMD Radeon Pro VII", architecture="gfx906"), "fixed float16", "old_amd"),
        (Device("rocm", "cuda:0", "AMD Radeon RX 6900 XT", architecture="gfx1030"), "fixed float16", "old_amd"),
        (Device("mps", "mps", "Apple M1 Pro"), "fixed float16", "mps"),
        (Device("mps", "mps", "Apple M4 Max"), "fixed float16", "mps"),
        (Device("npu", "npu:0", "npu"), "fixed float16", "unknown_device"),
        (CPU._replace(flags=frozenset({"avx512_bf16"})), "bfloat16", "cpu_bfloat16"),
        (CPU._replace(flags=frozenset({"amx_bf16", "avx512_fp16"})), "bfloat16", "cpu_bfloat16"),
        (CPU._replace(flags=frozenset({"bf16", "asimdhp"})), "bfloat16", "cpu_bfloat16"),
        (CPU._replace(flags=frozenset({"asimdhp"})), "fixed float16", "cpu_float16"),
        (CPU, "float32", "cpu_neither"),
    ],
    ids=lambda value: value.name if isinstance(value, Device) else None,
)
def test_every_kind_of_device_has_its_advice(device: Device, way: str, reason: str) -> None:
    """bfloat16 on a card that emulates it is slow and no more exact; float16 without the fix is NaN."""
    (found,) = advice.advise([device, CPU] if device.kind != "cpu" else [device])
    assert (found.way, found.reason.code, found.devices) == (way, f"reason.{reason}", (device,))
    for language in DOCTOR_TEXTS:
        said = remarks.in_words(found.reason, language)
        if device.kind == "cuda" and way != "bfloat16":
            assert f"{device.capability[0]}.{device.capability[1]}" in said  # type: ignore[index]
        assert all(remarks.in_words(other, language) for other in found.also)


def test_an_apple_gpu_before_m3_emulates_bfloat16() -> None:
    assert Device("mps", "mps", "Apple M2 Max").bfloat16 is False
    assert Device("mps", "mps", "Apple M3").bfloat16 is None  # nothing to ask there
    assert Device("mps", "mps", "Apple M10").bfloat16 is None


def test_cards_that_differ_are_advised_apart(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [nvidia("A100", 8, 0), nvidia("Tesla T4", 7, 5, 1), nvidia("Tesla T4", 7, 5, 2)]
    found = advice.advise([*cards, CPU])
    assert [[device.place for device in item.devices] for item in found] == [["cuda:0"], ["cuda:1", "cuda:2"]]
    monkeypatch.setattr(doctor, "devices", lambda: [*cards, CPU])
    report = qwen2_fp16_fix.doctor()
    assert codes(report.warnings) == ["device.mixed"]
    targets = [item.code.rpartition(".to(")[2] for item in report.advice]
    assert targets == ['"cuda:0")', '"cuda:1")']


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        (["sm_70", "sm_75", "sm_80"], (7, 0), True),
        (["sm_75", "sm_80", "sm_90", "sm_120"], (7, 0), False),  # torch for CUDA 13 on a V100
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["sm_80", "compute_80"], (9, 0), True),
        (["sm_90a"], (9, 0), True),
        (["sm_75", "sm_120"], (12, 0), True),
        ([], (7, 0), True),
    ],
)
def test_a_card_runs_code_of_its_major_version_or_ptx(
    built_for: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert devices.has_kernels(built_for, capability) is runs


def test_emulation_is_not_taken_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda.is_bf16_supported()` says True on a T4."""
    properties = types.SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    card, cpu = devices.devices()
    assert (card.kind, card.place, card.capability, card.memory) == ("cuda", "cuda:0", (7, 5), 2**34)
    assert (card.bfloat16, card.float16, card.has_kernels, cpu.kind) == (False, True, False, "cpu")
    properties.major, properties.minor = 8, 0  # and a torch that cannot use what the card has
    assert devices.devices()[0].bfloat16 is False
    properties.major, properties.minor = 7, 5
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # torch before it took the question
    assert devices.devices()[0].bfloat16 is False


def test_the_flags_of_a_cpu_are_read_where_torch_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("get_capabilities", "_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n\nprocessor\t: 1\n")
    assert devices.cpu_flags(cpuinfo) == {"avx512_bf16", "amx_bf16"}
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd fphp asimdhp\n")
    assert devices.cpu_flags(cpuinfo) == {"asimdhp"}
    assert devices.cpu_flags(tmp_path / "absent") == set()


def test_this_machine_is_described() -> None:
    *_, cpu = devices.devices()
    assert cpu.kind == "cpu"
    assert cpu.name
    assert cpu.level == torch.backends.cpu.get_cpu_capability()


@pytest.mark.parametrize("way", advice.WAYS)
def test_the_lines_of_code_run(way: str) -> None:
    """What people paste must load the model in the dtype named, with the fix where it is promised."""
    code = advice.lines_of_code(way, CPU, transformers.__version__)
    names: dict[str, Any] = {}
    exec(code.replace("PATH", str(CHECKPOINT)), names)
    model, chosen = names["model"], advice.WAYS[way]
    assert model.dtype == getattr(torch, chosen.dtype)
    assert qwen2_fp16_fix.status(model).model.fixed is chosen.takes_fix
    assert ("qwen2_fp16_fix" in code) is chosen.takes_fix


def test_the_lines_of_code_fit_the_release_and_the_device() -> None:
    assert " torch_dtype=torch.float16" in advice.lines_of_code("fixed float16", CPU, "4.55.4")
    assert " dtype=torch.float16" in advice.lines_of_code("fixed float16", CPU, "4.56.0")
    assert '.to("cuda")' in advice.lines_of_code("bfloat16", nvidia("A100", 8, 0), "4.56.0")
    assert '.to("cuda")' in advice.lines_of_code("bfloat16", Device("rocm", "cuda:0", ""), "4.56.0")
    assert '.to("mps")' in advice.lines_of_code("fixed float16", Device("mps", "mps", ""), "4.56.0")


def test_a_torch_without_kernels_for_the_card_is_a_finding(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A V100 with a torch for CUDA 13: every call ends in "no kernel image is available"."""
    card = nvidia("Tesla V100", 7, 0)._replace(has_kernels=False)
    monkeypatch.setattr(doctor, "devices", lambda: [card, CPU])
    found = qwen2_fp16_fix.doctor()
    assert codes(found.findings) == ["device.no_kernels"]
    assert "7.0" in found.verdict
