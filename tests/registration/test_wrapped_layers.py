"""Classes that torch makes at runtime over ours: sharded, checkpointed, compiled layers."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen2_fp16_fix
from qwen2_fp16_fix.status_result import PartCount
from tests.registration.models import PROMPT
from tests.stress import TINY


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """This process alone, by gloo."""
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_fully_shard_renames_classes(source: Any) -> None:
    """FSDPQwen2DecoderLayer: `status` said that what is fixed is not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model = qwen2_fp16_fix.fix(copy.deepcopy(source).half())
    expected = model(input_ids=PROMPT).logits
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert type(model.model.layers[0]).__name__ == "FSDPQwen2DecoderLayer"
    status = qwen2_fp16_fix.status(model).model
    assert (status.fixed, status.problem, status.code) == (True, None, "package")
    assert status.parts["Qwen2DecoderLayer"] == PartCount(TINY.layers, TINY.layers)
    assert len(status.ranges) == TINY.layers
    assert qwen2_fp16_fix.is_fixed(model)
    found = model(input_ids=PROMPT).logits
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)  # by token now: a float16 step of a logit of 16
    assert qwen2_fp16_fix.fix(model) is model  # it is
    with pytest.raises(qwen2_fp16_fix.PatchConflictError, match="fully_shard"):
        qwen2_fp16_fix.unfix(model)
    assert qwen2_fp16_fix.is_fixed(model)


@pytest.mark.usefixtures("process_group")
def test_what_is_sharded_first_says_why_it_cannot_be_fixed(source: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = copy.deepcopy(source).half()
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    assert not qwen2_fp16_fix.is_fixed(model)
    with pytest.raises(qwen2_fp16_fix.PatchConflictError, match="fully_shard"):
        qwen2_fp16_fix.fix(model)
    assert not any(type(module).__module__.startswith("qwen2_fp16_fix") for module in model.modules())


def test_layers_wrapped_afterwards_stay_fixed(source: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = qwen2_fp16_fix.fix(copy.deepcopy(source).half())
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    status = qwen2_fp16_fix.status(model).model
    assert (status.fixed, status.problem) == (True, None)
    assert len(status.ranges) == TINY.layers
    assert qwen2_fp16_fix.is_fixed(qwen2_fp16_fix.fix(model))
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=PROMPT).logits).all()
