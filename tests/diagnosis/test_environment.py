"""The doctor notices other tools and settings that change the numbers."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.qwen2 import modeling_qwen2

import qwen2_fp16_fix
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
