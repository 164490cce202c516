"""Counts what a run asks of a device: kernel launches, bytes moved and held, FLOPs and waits for the host.

Nothing is timed, so the counts are the same on every machine. An operator that makes new numbers is one launch. One
that returns another view of the same numbers, or memory without numbers in it, is none.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from qwen2_fp16_fix.patches import numerics

from .counting_rules import (
    flops_of,
    is_one_kernel_on_gpus,
    launches_kernel,
    made,
    tensors,
    traffic,
    waits_for_host,
    without_out,
)

aten = torch.ops.aten
#: Operators whose last two arguments are the factors of a product in their dtype.
MATMULS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
CONSTANT = numerics.constant
#: Calls that read a result on the host. On the CPU no operator shows it.
HOST_READS = {"tolist", "numpy", "cpu", "__array__"}


@dataclass(frozen=True)
class Launch:
    """One operator that ran: its name, the types and sizes of what it took, and what it moved and computed."""

    name: str
    operands: str
    read: int
    written: int
    flops: int


@dataclass
class Cost:
    """What a run asked for. Subtract the cost of a model with one layer less, and the cost of a layer is left."""

    launches: Counter[Launch]
    syncs: Counter[str]
    peak: (
        int  # the most bytes that tensors made in the run took at once; what a kernel allocates for itself is not seen
    )

    def __sub__(self, other: "Cost") -> "Cost":
        """Launch by launch; what only `other` has counts below zero."""
        launches, syncs = difference(self.launches, other.launches), difference(self.syncs, other.syncs)
        return Cost(launches, syncs, self.peak - other.peak)

    @property
    def kernels(self) -> int:
        """Operators that launch one."""
        return self.launches.total()

    @property
    def read(self) -> int:
        """Bytes."""
        return sum(launch.read * count for launch, count in self.launches.items())

    @property
    def written(self) -> int:
        """Bytes."""
        return sum(launch.written * count for launch, count in self.launches.items())

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    @property
    def flops(self) -> int:
        """Of matmuls and attention kernels: two for each product that is added up. Causal kernels count in full."""
        return sum(launch.flops * count for launch, count in self.launches.items())


def difference(left: Counter[Any], right: Counter[Any]) -> Counter[Any]:
    """left - right with what is negative kept and what is zero left out."""
    return Counter({key: left[key] - right[key] for key in {*left, *right} if left[key] != right[key]})


def cost_of(run: Callable[[], Any], compute: bool = True, fused_norm: bool = True) -> Cost:
    """What `run` asks of a GPU, without autograd, and run on one or not.

    Without `compute`, matmuls give zeros at once, which makes 7B quick. fused_norm: whether torch has one kernel for an
    RMSNorm there, as 2.10 has for CUDA and 2.8 has not.
    """
    launches = Launches(compute)
    calls = Calls(launches)
    gpu = mock.patch.multiple(
        numerics, runs_on_cpu=never, has_fused_norm=lambda device_type: fused_norm, constant=uncounted
    )
    with gpu, torch.no_grad(), calls, launches:
        run()
    return Cost(launches.launches, launches.syncs + calls.syncs, launches.held.peak)


def never(tensor: Tensor) -> bool:
    """Stands for `runs_on_cpu`. (A Mock would keep every tensor it is asked about, and they count.)"""
    return False


def uncounted(value: float, device: torch.device) -> Tensor:
    """Stands for `constant`, which makes a number the first time only: it is no part of what each run costs."""
    with _disable_current_modes():
        return CONSTANT(value, device)


class Calls(TorchFunctionMode):
    """Sees what operators do not show: results read by the host, and calls that are one kernel on a GPU only."""

    def __init__(self, launches: "Launches") -> None:
        """Nothing read so far."""
        super().__init__()
        self.launches = launches
        self.syncs: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `function`."""
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name in HOST_READS:
            self.syncs[name] += 1
        if not is_one_kernel_on_gpus(name, tensors((args, kwargs))):
            return function(*args, **kwargs)
        self.launches.paused = True
        try:
            result = function(*args, **kwargs)
        finally:
            self.launches.paused = False
        self.launches.note(name, tensors((args, without_out(kwargs))), tensors(result))
        self.launches.held.add(tensors(result))
        return result


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves __init_subclass__ untyped
    """Sees every operator below autograd, composite ones in the parts they run as."""

    def __init__(self, compute: bool = True) -> None:
        """Nothing launched so far."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.compute = compute
        self.paused = False
        self.held = Held()
        self.launches: Counter[Launch] = Counter()
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `function` and notes it."""
        kwargs = kwargs or {}
        skipped = function in MATMULS and not self.compute
        result = empty_product(*args[-2:]) if skipped else function(*args, **kwargs)
        name, inputs, outputs = function.overloadpacket.__name__, tensors((args, kwargs)), tensors(result)
        if waits_for_host(function, name, inputs, outputs):
            self.syncs[name] += 1
        if not self.paused and launches_kernel(function, name, inputs, outputs):
            self.note(name, tensors((args, without_out(kwargs))), outputs, flops_of(function, args, kwargs, result))
        if not self.paused:
            self.held.add(made(inputs, outputs))
        return result

    def note(self, name: str, inputs: list[Tensor], outputs: list[Tensor], flops: int = 0) -> None:
        """Counts one launch."""
        read, written = traffic(name, inputs, outputs)
        self.launches[Launch(name, describe(inputs), read, written, flops)] += 1


class Held:
    """The bytes of the storages it was told of, until each is freed."""

    def __init__(self) -> None:
        """None so far."""
        self.known: set[int] = set()
        self.now = self.peak = 0

    def add(self, new: list[Tensor]) -> None:
        """Counts the storages of these, each once."""
        for storage in (tensor.untyped_storage() for tensor in new):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def _freed(self, identity: int, size: int) -> None:
        self.known.discard(identity)
        self.now -= size


def empty_product(left: Tensor, right: Tensor) -> Tensor:
    """Zeros in place of left @ right."""
    return left.new_zeros((*left.shape[:-1], right.shape[-1]))


def describe(inputs: list[Tensor]) -> str:
    """Types and sizes of the operands, as `f16[1,512,896] f32[896]`."""
    return " ".join(f"{short(t.dtype)}{list(t.shape)}".replace(", ", ",") for t in inputs)


def short(dtype: torch.dtype) -> str:
    """`float16` as `f16`."""
    return str(dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")
