"""What counts: which operators launch a kernel, what they read, write and compute, and where the host waits."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

#: Operators that read of their first input as much as they return.
GATHERS = {"embedding", "index", "index_select", "gather"}
#: In-place operators that write as much as their last input has and read nothing of what they write to.
STORES = {"copy_", "index_copy_", "index_put_", "_index_put_impl_"}
#: In-place operators that read nothing.
FILLS = {"fill_", "zero_", "uniform_", "normal_"}


def without_out(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments but for `out`, which is written to and not read."""
    return {name: value for name, value in kwargs.items() if name != "out"}


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in a tree of arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def is_one_kernel_on_gpus(name: str, inputs: list[Tensor]) -> bool:
    """A softmax widens its input as it reads it; an RMSNorm of one dtype is fused, where it is called at all.

    The CPU runs both in parts. The counts are for GPUs, where launches are what costs. A fixed model calls F.rms_norm
    only where torch has the kernel.
    """
    return name == "softmax" or (name == "rms_norm" and len({tensor.dtype for tensor in inputs}) == 1)


def launches_kernel(function: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether numbers were made: into new memory, or in place."""
    if function._schema.is_mutable:
        return True
    if name.startswith(("empty", "new_empty")):
        return False
    return bool(made(inputs, outputs))


def made(inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    """The outputs that lie in memory of their own."""
    old = {tensor.untyped_storage()._cdata for tensor in inputs}
    return [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in old]


def waits_for_host(function: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether the host has to see a number before it can go on: one it is handed, or the size of what it is handed."""
    if torch.Tag.data_dependent_output in function.tags:
        return True
    if torch.Tag.dynamic_output_shape in function.tags:
        return name != "index" or any(tensor.dtype in (torch.bool, torch.uint8) for tensor in inputs[1:])
    leaves = {tensor.device.type for tensor in inputs} - {"cpu"}
    return bool(leaves) and any(tensor.device.type == "cpu" for tensor in outputs)


def traffic(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[int, int]:
    """Bytes read and written. What is read twice by one kernel is read once; so is what is broadcast."""
    if name in STORES:
        return sum_of(inputs[1:]), addressed(inputs[-1])
    if name in GATHERS:
        return sum_of(outputs) + sum_of(inputs[1:]), sum_of(outputs)
    return 0 if name in FILLS else sum_of(inputs), sum_of(outputs)


def sum_of(operands: Iterable[Tensor]) -> int:
    """Bytes of the operands, each part of memory once."""
    places = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()): addressed(t) for t in operands}
    return sum(places.values())


def addressed(tensor: Tensor) -> int:
    """Bytes that a tensor's strides reach: its numbers, without what is broadcast."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    count = 1 if tensor.numel() else 0
    for size, stride in sizes:
        count *= size if stride else 1
    return count * tensor.element_size()


def flops_of(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    """By torch's own formulas, and for fused attention by 4·B·H·Q·K·D, which theirs does not know for the CPU."""
    packet = function.overloadpacket
    if packet.__name__.startswith("_scaled_dot_product"):
        query, key = args[0], args[1]
        return int(4 * query.numel() * key.shape[-2])
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
