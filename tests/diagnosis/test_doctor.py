"""The doctor says what to do on every kind of hardware, notices what is wrong, and tells nobody whose machine it is."""

import contextlib
import io
import json
import re
import shutil
import string
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.qwen2 import modeling_qwen2
from typer.testing import CliRunner

import qwen2_fp16_fix
from qwen2_fp16_fix import demo, doctor_texts
from qwen2_fp16_fix import locking as pinning
from qwen2_fp16_fix import model_status as inspection
from qwen2_fp16_fix.cli import commands as cli
from qwen2_fp16_fix.demo import CHECKPOINT
from qwen2_fp16_fix.diagnosis import advice, numeric_settings, other_tools, redaction, self_test, self_test_model
from qwen2_fp16_fix.diagnosis import checkpoint as checkpoint_facts
from qwen2_fp16_fix.diagnosis import devices as hardware
from qwen2_fp16_fix.diagnosis import doctor as diagnosis
from qwen2_fp16_fix.diagnosis import text as diagnosis_page
from qwen2_fp16_fix.diagnosis.devices import Device
from qwen2_fp16_fix.patches import blocks, keys, modeling_qwen2_fp16, planning, range_plan

ROOT = Path(__file__).parents[2]
CPU = Device("cpu", "cpu", "a CPU")


def nvidia(name: str, major: int, minor: int, index: int = 0) -> Device:
    return Device("cuda", f"cuda:{index}", name, (major, minor))


# --- the texts ---


def gaps(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def test_both_languages_say_the_same_things() -> None:
    """A sentence missing in one language, or a gap it does not fill, ends in a KeyError for its readers only."""
    english, chinese = doctor_texts.TEXTS["en"], doctor_texts.TEXTS["zh"]
    assert list(english) == list(chinese)
    for code, text in english.items():
        assert gaps(text) == gaps(chinese[code]), code
        assert not re.search("[一-鿿]", text), code


def test_every_sentence_exists_and_every_text_is_said() -> None:
    """A misspelt code raises when its finding comes up, on the one machine that has it."""
    rooms = [path for path in (ROOT / "qwen2_fp16_fix").glob("*.py") if path.name != "doctor_texts.py"]
    source = "\n".join(path.read_text(encoding="utf-8") for path in rooms)
    literal = set(re.findall(r'"((?:also|checkpoint|device|fix|lock|reason|self_test|tool|verdict)\.\w+)"', source))
    assert literal <= set(doctor_texts.ENGLISH)
    built = {f"way.{way}" for way in advice.WAYS} | {f"tool.{name}" for name in other_tools.KNOWN}
    built |= {f"quantised.{name}" for name in (*checkpoint_facts.QUANTISATIONS, "other")} | {"lock.none", "lock.kept"}
    built |= {f"setting.{item.name.rpartition('.')[2]}" for item in numeric_settings.settings()}
    built |= {f"matters.{item.matters}" for item in numeric_settings.settings()}
    pages = {f"page.{code}" for code in re.findall(r"(?:say|heading|remarks)\([\"'](\w+)", source)}
    pages |= {f"page.{code}" for code in ("native", "emulated", "unknown", "failed")}
    assert literal | built | pages == set(doctor_texts.ENGLISH)


# --- hardware and advice ---


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
def test_advice(device: Device, way: str, reason: str) -> None:
    """bfloat16 on a card that emulates it is slow and no more exact; float16 without the fix is NaN."""
    (found,) = advice.advise([device, CPU] if device.kind != "cpu" else [device])
    assert (found.way, found.reason.code, found.devices) == (way, f"reason.{reason}", (device,))
    for language in doctor_texts.TEXTS:
        said = doctor_texts.in_words(found.reason, language)
        if device.kind == "cuda" and way != "bfloat16":
            assert f"{device.capability[0]}.{device.capability[1]}" in said  # type: ignore[index]
        assert all(doctor_texts.in_words(other, language) for other in found.also)


def test_what_apple_emulates() -> None:
    assert Device("mps", "mps", "Apple M2 Max").bfloat16 is False
    assert Device("mps", "mps", "Apple M3").bfloat16 is None  # nothing to ask there
    assert Device("mps", "mps", "Apple M10").bfloat16 is None


def test_cards_that_differ_are_advised_apart(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [nvidia("A100", 8, 0), nvidia("Tesla T4", 7, 5, 1), nvidia("Tesla T4", 7, 5, 2)]
    found = advice.advise([*cards, CPU])
    assert [[device.place for device in item.devices] for item in found] == [["cuda:0"], ["cuda:1", "cuda:2"]]
    monkeypatch.setattr(diagnosis, "devices", lambda: [*cards, CPU])
    report = qwen2_fp16_fix.doctor()
    assert codes(report["warnings"]) == ["device.mixed"]
    targets = [item["code"].rpartition(".to(")[2] for item in report["advice"]]
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
def test_kernels_for_a_card(built_for: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert hardware.has_kernels(built_for, capability) is runs


def test_emulation_is_not_taken_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda.is_bf16_supported()` says True on a T4."""
    properties = types.SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    card, cpu = hardware.devices()
    assert (card.kind, card.place, card.capability, card.memory) == ("cuda", "cuda:0", (7, 5), 2**34)
    assert (card.bfloat16, card.float16, card.has_kernels, cpu.kind) == (False, True, False, "cpu")
    properties.major, properties.minor = 8, 0  # and a torch that cannot use what the card has
    assert hardware.devices()[0].bfloat16 is False
    properties.major, properties.minor = 7, 5
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # torch before it took the question
    assert hardware.devices()[0].bfloat16 is False


def test_the_flags_of_a_cpu_are_read_where_torch_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("get_capabilities", "_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n\nprocessor\t: 1\n")
    assert hardware.cpu_flags(cpuinfo) == {"avx512_bf16", "amx_bf16"}
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd fphp asimdhp\n")
    assert hardware.cpu_flags(cpuinfo) == {"asimdhp"}
    assert hardware.cpu_flags(tmp_path / "absent") == set()


def test_this_machine_is_described() -> None:
    *_, cpu = hardware.devices()
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


# --- the self-test ---


def test_the_self_test_passes() -> None:
    result, finding = self_test.self_test("cpu")
    assert result["passed"], finding
    assert [row["finite"] for row in result["rows"]] == [False, False, True, True]
    assert max(row["kl"] for row in result["rows"][2:]) < self_test.KL_LIMIT / 5  # room for another device's order
    json.dumps(result)


def half_scores(query: Any, key: Any, value: Any, mask: Any, scaling: float, dropout: float = 0.0) -> Any:
    """Eager as stock has it: product and scale in float16."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = (query.to(value.dtype) @ key.transpose(2, 3)) * scaling
    weights = torch.softmax((scores if mask is None else scores + mask).float(), -1).to(value.dtype)
    return weights @ value, weights


BREAKS: dict[str, list[tuple[Any, str, Any]]] = {
    "the fix does nothing": [(modeling_qwen2_fp16, "exchange_all", lambda *args, **kwargs: None)],
    "the residual stays float16": [(blocks, "promote_residual", lambda hidden_states: hidden_states)],
    "keys are not centred": [(keys.CentredKeys, "centre_keys", lambda *args: None)],
    "no exponents": [
        (planning, "plan_layer", lambda bounds: range_plan.Exponents(0, 0)),
        (planning, "unproven_sites", lambda bounds, exponents: []),
    ],
    "scores as stock has them": [(blocks, "grouped_attention", half_scores)],
}


@pytest.mark.parametrize("broken", BREAKS)
def test_the_self_test_fails_on_a_broken_fix(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A self-test that half a fix passes would tell people that all is well."""
    for owner, name, instead in BREAKS[broken]:
        monkeypatch.setattr(owner, name, instead)
    result, finding = self_test.self_test("cpu")
    assert not result["passed"]
    assert finding.code == ("self_test.not_close" if broken == "keys are not centred" else "self_test.not_finite")


def test_the_self_test_fails_where_stock_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardware that saturates instead of overflowing, or a model that is not broken, shows nothing about the fix."""
    monkeypatch.setattr(self_test_model, "_spike_keys", lambda model: None)
    monkeypatch.setattr(self_test_model, "_mark", lambda model: None)
    result, finding = self_test.self_test("cpu")
    assert not result["passed"]
    assert finding.code == "self_test.not_reproduced"


def test_the_self_test_fails_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's errors run over five lines of advice about environment variables; the first says what happened."""
    result, finding = self_test.self_test("cuda:7")
    assert not result["passed"]
    assert finding.code == "self_test.not_run"

    def no_kernel_image(model: nn.Module) -> nn.Module:
        raise RuntimeError("CUDA error: no kernel image is available\nFor debugging consider passing …")

    monkeypatch.setattr("qwen2_fp16_fix.in_place.fix", no_kernel_image)
    result, finding = self_test.self_test("cpu")
    assert (result["passed"], finding.code) == (False, "self_test.not_run")
    assert doctor_texts.in_words(finding, "en").endswith("(RuntimeError: CUDA error: no kernel image is available).")


def test_the_self_test_draws_no_random_numbers() -> None:
    """Called in the middle of an experiment it must not change what a seed gives."""
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    self_test.self_test("cpu")
    assert torch.equal(torch.rand(3), expected)


def test_the_model_of_the_self_test_needs_every_repair() -> None:
    """Layers with an exponent hand on fp32: were the residual's layers scaled, nothing would test its promotion."""
    model = qwen2_fp16_fix.fix(self_test_model.stock_model("eager").half())
    ranges = qwen2_fp16_fix.status(model).model.ranges
    assert [layer.mlp > 0 for layer in ranges] == [False, False, False, True]
    assert all(layer.keys == "centred" for layer in ranges)


# --- the whole report ---


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A known machine: no accelerator, no lock in the current folder, and a self-test that has passed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diagnosis, "devices", lambda: [CPU])
    passed = doctor_texts.remark("self_test.passed", device="cpu", kl="1e-07", limit="2e-06")
    monkeypatch.setattr(diagnosis, "self_test", lambda place: ({"device": place, "rows": [], "passed": True}, passed))


def pretend_release(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Lets the rooms that ask see another version. transformers puts a second module object in its own place."""
    for room in (diagnosis, inspection):
        monkeypatch.setattr(room.transformers, "__version__", version)


def codes(remarks: list[dict[str, str]]) -> list[str]:
    return [item["code"] for item in remarks]


def test_all_is_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real thing, self-test and checkpoint included."""
    monkeypatch.chdir(tmp_path)
    found = qwen2_fp16_fix.doctor(CHECKPOINT)
    assert found["healthy"], found["findings"]
    assert diagnosis.exit_code(found) == 0
    assert found["verdict"].startswith("All well: run Qwen2 here in ")
    assert {result["device"] for result in found["self_test"]["results"]} >= {"cpu"}
    assert found["checkpoint"]["proven"]
    assert found["versions"]["transformers"] == transformers.__version__
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_failed_self_test_is_a_finding(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "self_test", self_test.self_test)
    monkeypatch.setattr(modeling_qwen2_fp16, "exchange_all", lambda *args, **kwargs: None)
    found = qwen2_fp16_fix.doctor()
    assert codes(found["findings"]) == ["self_test.not_finite"]
    assert "fixed float16 eager is not finite on cpu" in found["verdict"]
    assert diagnosis.exit_code(found) == 1


def test_switched_off_is_a_finding(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_FP16_FIX", "0")
    found = qwen2_fp16_fix.doctor()
    assert codes(found["findings"]) == ["fix.off"]
    assert diagnosis.exit_code(found) == 1
    monkeypatch.undo()
    monkeypatch.setenv("QWEN2_FP16_FIX", "0")
    assert not self_test.self_test("cpu")[0]["passed"]  # really off, not only said to be


def test_an_unsupported_release_exits_3(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_release(monkeypatch, "4.36.2")
    found = qwen2_fp16_fix.doctor()
    assert diagnosis.exit_code(found) == 3
    assert not found["healthy"]
    assert "4.36.2" in found["verdict"]
    assert found["advice"] == []  # its code would end in the same error
    assert found["self_test"] == {
        "limit": self_test.KL_LIMIT,
        "text": doctor_texts.ENGLISH["self_test.skipped"],
        "results": [],
    }


def test_registration_shows(healthy: None) -> None:
    assert not qwen2_fp16_fix.doctor()["fix"]["registered"]
    with qwen2_fp16_fix.registered():
        found = qwen2_fp16_fix.doctor()["fix"]
    assert found["registered"]
    assert found["text"] == doctor_texts.ENGLISH["fix.registered"]


class Foreign(nn.Module):
    """A norm by another tool."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


@pytest.mark.parametrize("module", ["liger_kernel.transformers.rms_norm", "somebody.patches"])
def test_a_class_replaced_by_another_tool_is_a_finding(
    module: str, healthy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Liger does it; the fix refuses such models, so the doctor must not call the environment well."""
    foreign = type("Foreign", (Foreign,), {"__module__": module})
    monkeypatch.setattr(modeling_qwen2, "Qwen2RMSNorm", foreign)
    found = qwen2_fp16_fix.doctor()
    assert codes(found["findings"]) == ["tool.replaced"]
    assert "Qwen2RMSNorm" in found["verdict"]
    (tool,) = (tool for tool in found["tools"] if tool["replaced"])
    assert tool["name"] == ("liger-kernel" if module.startswith("liger") else "somebody")


def test_a_forward_replaced_by_another_tool_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Unsloth does it."""

    def fast_forward(self: Any) -> None: ...

    fast_forward.__module__ = "unsloth.models.qwen2"
    monkeypatch.setattr(modeling_qwen2.Qwen2Attention, "forward", fast_forward)
    assert other_tools.replaced_classes() == {"Qwen2Attention": "unsloth.models.qwen2"}


def test_our_own_registration_is_no_other_tool() -> None:
    """It wraps the constructor of transformers' Qwen2Model."""
    with qwen2_fp16_fix.registered():
        assert other_tools.replaced_classes() == {}


def test_installed_tools_are_named(healthy: None) -> None:
    found = {tool["name"]: tool for tool in qwen2_fp16_fix.doctor()["tools"]}
    import accelerate
    import peft

    assert found["accelerate"]["version"] == accelerate.__version__
    assert found["peft"]["version"] == peft.__version__
    assert "vllm" not in found


@pytest.fixture
def sums_in_half() -> Any:
    """sdpa's math kernel as someone has set it who wants speed."""
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    yield
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


def test_a_risky_setting_is_a_warning(healthy: None, sums_in_half: None) -> None:
    """On the CPU too: there the math kernel then overflows like any other."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = torch.full((1, 1, 2, 64), 200.0).half()
    with sdpa_kernel([SDPBackend.MATH]):
        assert not nn.functional.scaled_dot_product_attention(query, query, query).isfinite().all()
    found = qwen2_fp16_fix.doctor()
    assert codes(found["warnings"]) == ["setting.allow_fp16_bf16_reduction_math_sdp"]
    assert found["healthy"]
    (setting,) = (item for item in found["settings"] if item["risky"])
    assert (setting["value"], setting["applies"], setting["matters"]) == (True, True, "finiteness")


def test_settings_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def value(name: str) -> Any:
        return next(item.value for item in numeric_settings.settings() if item.name.endswith(name))

    assert value("autocast") == "off"
    with torch.autocast("cpu", dtype=torch.float16):
        assert value("autocast") == "cpu float16"
    before = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = not before
    assert value("matmul.allow_fp16_reduced_precision_reduction") is not before
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = before
    monkeypatch.setattr(numeric_settings, "matmul", object())  # an older torch
    assert value("matmul.allow_fp16_accumulation") is None


def test_a_torch_without_kernels_for_the_card_is_a_finding(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A V100 with a torch for CUDA 13: every call ends in "no kernel image is available"."""
    card = nvidia("Tesla V100", 7, 0)._replace(has_kernels=False)
    monkeypatch.setattr(diagnosis, "devices", lambda: [card, CPU])
    found = qwen2_fp16_fix.doctor()
    assert codes(found["findings"]) == ["device.no_kernels"]
    assert "7.0" in found["verdict"]


@pytest.mark.usefixtures("healthy")
def test_a_lock_in_the_current_folder_is_checked() -> None:
    assert qwen2_fp16_fix.doctor()["lock"]["state"] == "none"
    file = qwen2_fp16_fix.lock(pinning.FILE_NAME)
    assert qwen2_fp16_fix.doctor()["lock"]["state"] == "kept"
    file.write_text(file.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    found = qwen2_fp16_fix.doctor()
    assert found["lock"]["state"] == "drifted"
    assert "1.0 is locked" in found["lock"]["differences"][0]
    assert codes(found["findings"]) == ["lock.drifted"]


@pytest.mark.usefixtures("healthy")
def test_the_lock_that_the_environment_names_is_checked(somebodys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process was pinned, and doctor said "not pinned: no lock here"."""
    lock = qwen2_fp16_fix.lock(somebodys / f"{SECRET}.json")
    monkeypatch.setenv("QWEN2_FP16_FIX_LOCK", f" {lock.name} ")
    assert qwen2_fp16_fix.doctor()["lock"]["state"] == "kept"
    lock.write_text(lock.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    shutil.copy(lock, pinning.FILE_NAME)  # the same difference is said once
    assert qwen2_fp16_fix.doctor()["lock"]["differences"] == [f"torch {torch.__version__} is installed, 1.0 is locked."]
    lock.unlink()
    Path(pinning.FILE_NAME).unlink()
    found = qwen2_fp16_fix.doctor()["lock"]
    assert "cannot be read as a lock" in found["differences"][0]
    assert SECRET not in found["differences"][0]


@pytest.mark.usefixtures("healthy")
def test_an_exported_folder_is_held_against_its_own_lock(tmp_path: Path) -> None:
    """By its files alone: it was made somewhere else, with another torch."""
    out = qwen2_fp16_fix.export(demo.CHECKPOINT, tmp_path / "out")
    lock = out / pinning.FILE_NAME
    lock.write_text(lock.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    assert qwen2_fp16_fix.doctor(out)["lock"]["state"] == "kept"
    with (out / "keys.py").open("a") as file:
        file.write("# edited")
    found = qwen2_fp16_fix.doctor(out)
    assert found["lock"]["differences"] == ["keys.py is not the file that was locked."]


# --- checkpoints ---


def checkpoint(folder: Path, **config: Any) -> Path:
    """The demo checkpoint with another config."""
    shutil.copytree(CHECKPOINT, folder)
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def replace_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Writes the weights of a copied checkpoint anew."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)


def examine(path: Path) -> tuple[dict[str, Any], list[str], list[str]]:
    facts, notes, problems = checkpoint_facts.examine(path)
    for remark in (*notes, *problems):
        assert all(doctor_texts.in_words(remark, language) for language in doctor_texts.TEXTS)
    return facts, [note.code for note in notes], [problem.code for problem in problems]


def test_a_plain_checkpoint() -> None:
    facts, notes, problems = examine(CHECKPOINT)
    assert facts["stored"] == {"F16": facts["parameters"]}
    assert facts["bytes"] == (CHECKPOINT / "model.safetensors").stat().st_size
    assert (facts["exported"], facts["quantised"], facts["proven"]) == (False, None, True)
    assert (notes, problems) == (["checkpoint.proven"], [])


def test_a_large_checkpoint_is_not_proven_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_facts, "QUICK", 0)
    facts, notes, _ = examine(CHECKPOINT)
    assert notes == ["checkpoint.certify"]
    assert "proven" not in facts


OWN = "OWNER/NAME--modeling_qwen2_fp16"
TRAPS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "exported": (
        {
            "architectures": ["Qwen2FP16ForCausalLM"],
            "auto_map": {"AutoModel": f"{OWN}.Qwen2FP16Model", "AutoModelForCausalLM": f"{OWN}.Qwen2FP16ForCausalLM"},
        },
        ["checkpoint.exported"],
    ),
    "code under a stock name": (
        {"auto_map": {"AutoModel": "modeling_x.Model", "AutoModelForCausalLM": "modeling_x.LM"}},
        ["checkpoint.stock_name"],
    ),
    "no AutoModel": (
        {"architectures": ["Qwen2XForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_x.LM"}},
        ["checkpoint.no_auto_model"],
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_are_named(trap: str, tmp_path: Path) -> None:
    """vLLM silently runs its own Qwen2 for a stock name, and the stock one for an auto_map without AutoModel."""
    config, expected = TRAPS[trap]
    facts, notes, problems = examine(checkpoint(tmp_path / "x", **config))
    own = trap == "exported"  # what is not loads as something else than what is proven here
    assert notes == [*expected, "checkpoint.proven" if own else "checkpoint.not_proven"]
    assert problems == ([] if own else ["checkpoint.foreign_code"])
    assert facts["exported"] is own
    assert "OWNER" not in json.dumps(facts)


def test_a_strict_export_is_known(tmp_path: Path) -> None:
    """By its type alone, should its auto_map have got lost."""
    facts, notes, problems = examine(checkpoint(tmp_path / "x", model_type="qwen2_fp16"))
    assert facts["exported"]
    assert (notes, problems) == (["checkpoint.exported", "checkpoint.proven"], [])


def test_what_export_writes_has_no_traps(tmp_path: Path) -> None:
    for strict in (False, True):
        out = qwen2_fp16_fix.export(CHECKPOINT, tmp_path / str(strict), strict=strict)
        assert examine(out)[1:] == (["checkpoint.exported", "checkpoint.proven"], [])


@pytest.mark.parametrize(
    ("method", "code"),
    [("gptq", "gptq"), ("awq", "awq"), ("bitsandbytes", "bitsandbytes"), ("quark", "other"), (None, "other")],
)
def test_quantisation_is_explained(method: str | None, code: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x", quantization_config={"bits": 4, **({"quant_method": method} if method else {})})
    replace_tensors(
        path, lambda tensors: {name.replace("_proj.weight", "_proj.qweight"): x for name, x in tensors.items()}
    )
    facts, notes, problems = examine(path)
    assert facts["quantised"] == (method or "unnamed")
    assert notes == [f"quantised.{code}", "checkpoint.never_proven"]
    assert not problems


def test_what_cannot_be_used_is_a_finding(healthy: None, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", model_type="llama")
    assert examine(other)[1:] == ([], ["checkpoint.not_qwen2"])
    damaged = checkpoint(tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert examine(damaged)[2] == ["checkpoint.broken"]
    found = qwen2_fp16_fix.doctor(damaged)
    assert codes(found["findings"]) == ["checkpoint.broken"]
    assert diagnosis.exit_code(found) == 1
    weights.unlink()
    assert examine(damaged)[2] == ["checkpoint.broken"]
    (damaged / "pytorch_model.bin").write_bytes(b"")
    assert examine(damaged)[1:] == (["checkpoint.bin"], [])


def test_a_large_checkpoint_is_seen_to_be_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reads its weights, so nothing else would notice what is missing."""
    monkeypatch.setattr(checkpoint_facts, "QUICK", 0)
    path = checkpoint(tmp_path / "x")
    missing = "model.layers.2.mlp.up_proj.weight"
    replace_tensors(path, lambda tensors: {name: x for name, x in tensors.items() if name != missing})
    assert examine(path)[2] == ["checkpoint.broken"]


def test_a_head_of_another_sort_is_not_missed(tmp_path: Path) -> None:
    """A classifier has no lm_head, and is whole without."""
    path = checkpoint(tmp_path / "x", architectures=["Qwen2ForSequenceClassification"])
    replace_tensors(path, lambda tensors: {name: x for name, x in tensors.items() if name != "lm_head.weight"})
    assert examine(path)[1:] == (["checkpoint.proven"], [])


def test_a_qwen2_inside_another_model_is_not_called_foreign(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x", model_type="llava", text_config={"model_type": "qwen2"})
    assert examine(path)[1:] == (["checkpoint.wrapped"], [])


def test_what_cannot_be_proven_is_a_warning(healthy: None, tmp_path: Path) -> None:
    """Weights past 65504: the cast to float16 makes them infinite, whatever the arithmetic."""

    def too_large(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
        return tensors

    path = checkpoint(tmp_path / "x")
    replace_tensors(path, too_large)
    found = qwen2_fp16_fix.doctor(path)
    assert codes(found["warnings"]) == ["checkpoint.not_proven"]
    assert found["checkpoint"]["stored"] == {"F32": found["checkpoint"]["parameters"]}


@pytest.mark.parametrize(
    "content",
    [
        None,
        "[]",
        "{",
        '{"architectures": 5}',
        '{"hidden_size": NaN}',
        '{"rope_theta": -Infinity}',
        '{"hidden_size": 1e999}',
        "{}",
    ],
)
def test_a_path_without_a_checkpoint_is_wrong_usage(
    content: str | None, healthy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "x"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    if content == "{}":  # JSON, and so a config: of nothing known
        assert codes(qwen2_fp16_fix.doctor(folder)["findings"]) == ["checkpoint.not_qwen2"]
        return
    monkeypatch.setattr(diagnosis, "self_test", lambda place: pytest.fail("tested first, which takes a while"))
    with pytest.raises(qwen2_fp16_fix.CheckpointError) as caught:
        qwen2_fp16_fix.doctor(folder)
    assert str(tmp_path) not in str(caught.value)


# --- privacy ---

SECRET = "zanzibar"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("/data/zanzibar/x.json is no lock", "… is no lock"),
        ("found '/data/zanzibar/x', and", "found '…', and"),
        ("/home/zanzibar/deep/er: no", "~: no"),
        ("~/zanzibar/x", "~"),
        (r"C:\Users\zanzibar\model cannot be read", "… cannot be read"),
        (r"\\server\zanzibar\model", "…"),
        ("/models/Zoo (1)/zanzibar/model.safetensors is damaged", "PATH/model.safetensors is damaged"),
        ("token hf_zanzibarzanzibar", "token …"),
        ("act(gate)·up and q/k are 1/2 of 3 / 4", "act(gate)·up and q/k are 1/2 of 3 / 4"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("python 3.11, torch 2.13.0+cpu", "python 3.11, torch 2.13.0+cpu"),
    ],
)
def test_redaction(text: str, redacted: str) -> None:
    places = {"/models/Zoo (1)/zanzibar": "PATH", "/home/zanzibar": "~"}
    assert redaction.redact({"a": [text, {"b": 1}]}, places) == {"a": [redacted, {"b": 1}]}


def test_every_spelling_of_the_path_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    places = redaction.private_places(Path("link"))
    for spelling in (str(tmp_path / "link"), str(tmp_path / "real")):
        assert redaction.redact(f"in {spelling}.", places) == "in PATH."
    monkeypatch.setenv("HOME", "/")
    assert "/" not in redaction.private_places(None)


@pytest.fixture
def somebodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose user, home, token, current folder and checkpoints can be recognised."""
    home = tmp_path / f"{SECRET}-home"
    for name in ("USER", "LOGNAME", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, f"hf_{SECRET}")
    monkeypatch.setenv("HOME", str(home))
    work = home / f"{SECRET} work"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    return work


def renderings(path: Path, language: str) -> str:
    found = qwen2_fp16_fix.doctor(path, language=language)
    with Console(width=100, record=True, file=io.StringIO()) as console:
        diagnosis_page.render(found, console, language)
    return json.dumps(found, ensure_ascii=False) + console.export_text()


@pytest.mark.parametrize("state", ["whole", "damaged", "incomplete", "empty"])
def test_a_report_does_not_say_whose_it_is(
    state: str, healthy: None, somebodys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors quote paths, and the report is made to be pasted into public issues."""
    path = checkpoint(somebodys / f"{SECRET}-model", _name_or_path=f"/x/{SECRET}")
    weights = path / "model.safetensors"
    if state == "damaged":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif state == "incomplete":
        index = {"weight_map": dict.fromkeys(["model.norm.weight"], "model-00001-of-00002.safetensors")}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    elif state == "empty":
        weights.unlink()
    error = qwen2_fp16_fix.CheckpointError(f"{somebodys}/{pinning.FILE_NAME} is no lock")
    monkeypatch.setattr(diagnosis, "lock_differences", lambda path: [str(error)])
    reason = doctor_texts.remark("self_test.not_run", device="cpu", reason=f"OSError: {Path.home()}/.cache/x")
    monkeypatch.setattr(diagnosis, "self_test", lambda place: ({"device": place, "rows": [], "passed": False}, reason))
    for language in doctor_texts.TEXTS:
        said = renderings(path, language)
        assert SECRET not in said
        assert pinning.FILE_NAME in said  # the rest of the sentence is there


@pytest.mark.usefixtures("healthy")
def test_a_relative_path_is_private_too(somebodys: Path) -> None:
    """A name alone cannot be searched for in every text ("m" is in most), so no sentence may have it to begin with."""
    path = checkpoint(somebodys / SECRET)
    (path / "model.safetensors").unlink()
    said = renderings(Path(SECRET), "en")
    assert SECRET not in said
    assert "PATH has no model.safetensors" in " ".join(said.split())


@pytest.mark.usefixtures("healthy")
def test_the_owner_of_foreign_code_is_private(tmp_path: Path) -> None:
    """An export whose configuration names code in somebody's repository differs from its lock, which is quoted."""
    out = qwen2_fp16_fix.export(demo.CHECKPOINT, tmp_path / "out")
    (out / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": [f"{SECRET}/a--tok.T", None]}})
    )
    said = renderings(out, "en")
    assert SECRET not in said
    assert "names tok.T, which is not in the lock" in " ".join(said.split())


def test_the_command_does_not_say_whose_it_is(somebodys: Path, python: Callable[..., Any]) -> None:
    path = checkpoint(somebodys / f"{SECRET}-model")
    done = python("-m", "qwen2_fp16_fix", "doctor", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout  # plain when piped
    assert done.stdout.startswith("All well")
    assert not re.search(" $", done.stdout, re.M)
    assert "Traceback" not in done.stderr


# --- the command ---


class Command:
    """The command, in this process."""

    runner: ClassVar = CliRunner()

    def __call__(self, *arguments: str) -> Any:
        return self.runner.invoke(cli.app, ["doctor", *arguments])


def test_text_and_json_are_the_same_data(healthy: None) -> None:
    """Every sentence of the JSON is on the page, in both languages."""
    for language in doctor_texts.TEXTS:
        found = json.loads(Command()("--json", "--lang", language).stdout)
        page = Command()("--lang", language).stdout
        together = re.sub(r"\s", "", page)
        said = [found["verdict"], found["fix"]["text"], found["lock"]["text"], found["self_test"]["text"]]
        for part in ("tools", "settings"):
            said += [item["text"] for item in found[part]]
        said += [found["advice"][0]["reason"], *found["advice"][0]["also"], found["self_test"]["results"][0]["text"]]
        for sentence in said:
            assert re.sub(r"\s", "", sentence) in together
        assert not re.search(" $", page, re.M)
        assert found["advice"][0]["code"].splitlines()[-1] in page  # whole: it is there to be copied
        for part in (found["verdict"], page):
            assert bool(re.search("[一-鿿]", part)) is (language == "zh")


def test_the_page_of_an_ill_machine(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_FP16_FIX", "0")
    monkeypatch.setattr(diagnosis, "lock_differences", lambda path: ["keys.py differs.", "torch differs."])
    done = Command()()
    assert done.exit_code == 1
    assert done.stdout.startswith("Not well: QWEN2_FP16_FIX=0 is set")
    assert "and 1 more below" in re.sub(r"\s+", " ", done.stdout)
    assert "What is wrong" in done.stdout
    assert "keys.py differs." in done.stdout
    assert "torch differs." in done.stdout


def test_the_page_in_a_terminal(healthy: None) -> None:
    """Colours come and the code stays whole."""
    found = qwen2_fp16_fix.doctor()
    with Console(force_terminal=True, color_system="standard", width=60, record=True, file=io.StringIO()) as console:
        diagnosis_page.render(found, console)
    plain = console.export_text(clear=False)
    assert found["advice"][0]["code"].splitlines()[-1] in plain
    assert "\x1b[" in console.export_text(styles=True)


def test_exit_codes_of_the_command(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Command()().exit_code == 0
    assert Command()("--lang", "tlh").exit_code == 2
    assert isinstance(Command()("absent").exception, qwen2_fp16_fix.CheckpointError)  # 2, as every such error
    pretend_release(monkeypatch, "4.36.2")
    assert Command()().exit_code == 3
