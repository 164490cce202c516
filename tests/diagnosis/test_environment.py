"""The doctor notices other tools and settings that change the numbers."""

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.qwen2 import modeling_qwen2

import qwen2_fp16_fix.registration.register  # which checks stock's classes, before a test replaces one
from qwen2_fp16_fix.diagnosis import environment
from tests.diagnosis.examples import codes


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
    assert codes(found.findings) == ["tool.replaced"]
    assert "Qwen2RMSNorm" in found.verdict
    (tool,) = (tool for tool in found.tools if tool.replaced)
    assert tool.name == ("liger-kernel" if module.startswith("liger") else "somebody")


def test_a_forward_replaced_by_another_tool_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Unsloth does it."""

    def fast_forward(self: Any) -> None: ...

    fast_forward.__module__ = "unsloth.models.qwen2"
    monkeypatch.setattr(modeling_qwen2.Qwen2Attention, "forward", fast_forward)
    assert environment.replaced_classes() == {"Qwen2Attention": "unsloth.models.qwen2"}


def test_a_function_replaced_by_another_tool_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed model rotates by itself, so the tool has no effect on it."""
    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", lambda *heads: heads)
    assert environment.replaced_classes() == {"apply_rotary_pos_emb": __name__}


def test_our_own_registration_is_no_other_tool() -> None:
    """It wraps the constructor of transformers' Qwen2Model."""
    with qwen2_fp16_fix.registered():
        assert environment.replaced_classes() == {}


def test_installed_tools_are_named(healthy: None) -> None:
    found = {tool.name: tool for tool in qwen2_fp16_fix.doctor().tools}
    import accelerate
    import peft

    assert found["accelerate"].version == accelerate.__version__
    assert found["peft"].version == peft.__version__
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
    assert codes(found.warnings) == ["setting.allow_fp16_bf16_reduction_math_sdp"]
    assert found.healthy
    (setting,) = (item for item in found.settings if item.risky)
    assert (setting.value, setting.applies, setting.matters) == (True, True, "finiteness")


def test_settings_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def value(name: str) -> Any:
        return next(item.value for item in environment.settings() if item.name.endswith(name))

    assert value("autocast") == "off"
    with torch.autocast("cpu", dtype=torch.float16):
        assert value("autocast") == "cpu float16"
    before = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = not before
    assert value("matmul.allow_fp16_reduced_precision_reduction") is not before
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = before
    monkeypatch.setattr(environment, "matmul", object())  # an older torch
    assert value("matmul.allow_fp16_accumulation") is None


def setting(name: str) -> environment.Setting:
    return next(item for item in environment.settings() if item.name == name)


CUDA, CPUS = "torch.backends.cuda.matmul", "torch.backends.mkldnn.matmul"


@pytest.fixture
def precisions() -> Iterator[None]:
    """A test begins as torch does. Whatever it sets, by old names or new ones, is as before."""
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.usefixtures("precisions")
def test_tf32_matters_to_no_fixed_model() -> None:
    """`doctor` called it a loss. tests/patches/test_float32_products.py has the measure."""
    torch.set_float32_matmul_precision("high")
    asked = [setting(name) for name in ("torch.set_float32_matmul_precision", f"{CUDA}.allow_tf32")]
    assert [(item.value, item.matters) for item in asked] == [("high", "no"), (True, "no")]


@pytest.mark.usefixtures("precisions")
def test_bfloat16_products_on_a_cpu_matter() -> None:
    torch.set_float32_matmul_precision("medium")
    asked = [setting(name) for name in ("torch.set_float32_matmul_precision", f"{CPUS}.fp32_precision")]
    assert [(item.value, item.matters) for item in asked] == [("medium", "closeness"), ("bf16", "closeness")]


@pytest.mark.usefixtures("precisions")
def test_the_newer_names_are_read() -> None:
    """torch then refuses to answer by the older ones, which `doctor` took for a torch without the setting."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    assert setting(f"{CUDA}.fp32_precision")[1:3] == ("tf32", "no")
    assert setting(f"{CPUS}.fp32_precision")[1:3] == ("bf16", "closeness")
    assert setting(f"{CUDA}.allow_tf32").value == environment.MIXED
    assert setting("torch.set_float32_matmul_precision")[1:3] == (environment.MIXED, "closeness")


@pytest.mark.usefixtures("precisions")
@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_precision_for_all_backends_is_read_of_each(language: str, healthy: None) -> None:
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    found = {item.name: item for item in qwen2_fp16_fix.doctor(language=language).settings}
    for name in (f"{CUDA}.fp32_precision", f"{CPUS}.fp32_precision"):
        assert (found[name].value, found[name].matters) == ("tf32", "no")
    assert not found[f"{CUDA}.fp32_precision"].applies  # there is no such card here
    assert found[f"{CPUS}.fp32_precision"].applies


def test_nvidias_own_switch_is_named(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    (found,) = (item for item in qwen2_fp16_fix.doctor().settings if item.name == "NVIDIA_TF32_OVERRIDE")
    assert (found.value, found.matters, found.applies) == ("1", "no", False)
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    assert setting("NVIDIA_TF32_OVERRIDE").value == "unset"


def test_a_torch_whose_math_kernel_keeps_float16_scores_is_a_warning(
    healthy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before torch 2.5 it always does, and has no setting for it."""
    older = types.SimpleNamespace(math_sdp_enabled=lambda: True)
    monkeypatch.setattr(environment, "cuda", older)
    found = qwen2_fp16_fix.doctor()
    assert codes(found.warnings) == ["setting.math_sdp_before_2_5"]
    assert "2.5" in found.warnings[0].text
    older.math_sdp_enabled = lambda: False
    assert codes(qwen2_fp16_fix.doctor().warnings) == []
