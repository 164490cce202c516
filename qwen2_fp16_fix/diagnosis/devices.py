"""The devices torch can use, as plain data that tests can construct."""

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ..results import Record
from .remarks import Remark, remark

CPU_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"})  # x86's names, then ARM's
CPU_FLOAT16 = frozenset({"avx512_fp16", "amx_fp16", "fp16_arith", "asimdhp"})
AMD_BFLOAT16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")  # have matrix instructions for bfloat16
FAST_PASCALS = ((5, 3), (6, 0), (6, 2))  # before Volta, float16 is slower than float32 on all others
CPUINFO = Path("/proc/cpuinfo")


class Device(NamedTuple):
    """One device, as torch and the system describe it."""

    kind: str  # cpu, cuda (NVIDIA), rocm (AMD), mps (Apple), or torch's name of another accelerator
    place: str  # torch's name of the device: cuda:0
    name: str
    capability: tuple[int, int] | None = None  # NVIDIA's compute capability
    architecture: str = ""  # of an AMD GPU, as gfx90a, or of a CPU, as x86_64
    flags: frozenset[str] = frozenset()  # a CPU's instructions for 16-bit arithmetic
    level: str = ""  # the instruction set that torch uses on a CPU, as AVX512
    torch_denies_bfloat16: bool = False  # torch says that there is none, emulation not counted
    has_kernels: bool = True  # whether this torch was built for it
    memory: int | None = None  # bytes

    @property
    def generation(self) -> str:
        """NVIDIA's compute capability as text: 7.0."""
        return ".".join(map(str, self.capability or ()))

    @property
    def bfloat16(self) -> bool | None:
        """Whether it computes in bfloat16 natively; None if that is not known."""
        if self.torch_denies_bfloat16:
            return False
        if self.kind == "cuda":
            return self.capability is not None and self.capability >= (8, 0)
        if self.kind == "rocm":
            return self.architecture.startswith(AMD_BFLOAT16)
        if self.kind == "mps":  # M1 and M2 convert to float32 and back
            return False if re.search(r"\bM[12]\b", self.name) else None
        return bool(self.flags & CPU_BFLOAT16) if self.kind == "cpu" else None

    @property
    def float16(self) -> bool | None:
        """Whether it computes in float16 natively and no slower than in float32; None if that is not known."""
        if self.kind == "cuda":
            return self.capability is not None and (self.capability >= (7, 0) or self.capability in FAST_PASCALS)
        if self.kind in ("rocm", "mps"):
            return True
        return bool(self.flags & CPU_FLOAT16) if self.kind == "cpu" else None


@dataclass(frozen=True)
class DeviceFacts(Record):
    """A device as the report has it: what `Device` says, and what follows from it."""

    kind: str
    place: str
    name: str
    capability: str | None
    architecture: str
    flags: list[str]
    level: str
    torch_denies_bfloat16: bool
    has_kernels: bool
    memory: int | None
    bfloat16: bool | None  # native; None if that is not known
    float16: bool | None


def examine_devices(hardware: Sequence[Device]) -> tuple[list[DeviceFacts], list[Remark], list[Remark]]:
    """The devices, those that this torch has no kernels for as findings, and no warnings."""
    facts: list[DeviceFacts] = []
    findings: list[Remark] = []
    for device in hardware:
        if not device.has_kernels:
            named = {"device": device.place, "name": device.name, "capability": device.generation}
            findings.insert(0, remark("device.no_kernels", **named))
        known = device._asdict() | {"capability": device.generation or None, "flags": sorted(device.flags)}
        facts.append(DeviceFacts(**known, bfloat16=device.bfloat16, float16=device.float16))
    return facts, findings, []


def devices() -> list[Device]:
    """Every device torch can compute on here, accelerators first, the CPU last."""
    found: list[Device] = []
    if torch.cuda.is_available():
        found += [_cuda(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(Device("mps", "mps", _cpu_name()))
    accelerator = getattr(torch, "accelerator", None)  # from torch 2.6
    if not found and accelerator is not None and accelerator.is_available():
        kind = accelerator.current_accelerator().type
        found += [Device(kind, f"{kind}:{index}", kind) for index in range(accelerator.device_count())]
    return [*found, _cpu()]


def _cuda(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    place, name, memory = f"cuda:{index}", str(properties.name), int(properties.total_memory)
    if torch.version.hip:
        architecture = str(getattr(properties, "gcnArchName", "")).partition(":")[0]
        return Device("rocm", place, name, architecture=architecture, memory=memory)
    capability = (int(properties.major), int(properties.minor))
    return Device(
        "cuda",
        place,
        name,
        capability,
        torch_denies_bfloat16=not _torch_knows_bfloat16(index),
        has_kernels=has_kernels(torch.cuda.get_arch_list(), capability),
        memory=memory,
    )


def _torch_knows_bfloat16(index: int) -> bool:
    """Torch's answer without emulation. True for releases that always count emulation: they say yes to a T4."""
    with torch.cuda.device(index):
        try:
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        except TypeError:
            return True


def has_kernels(built_for: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for `built_for` (sm_70, sm_90a, compute_90, …) runs on a GPU of this capability.

    Machine code (sm) runs on the same major version from its minor version on. PTX (compute) runs on everything newer.
    """
    known = [found for name in built_for if (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name))]
    for kind, major, minor in (found.groups() for found in known):
        built = (int(major), int(minor))
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return not known


def _cpu() -> Device:
    return Device(
        "cpu",
        "cpu",
        _cpu_name(),
        architecture=platform.machine(),
        flags=cpu_flags(),
        level=torch.backends.cpu.get_cpu_capability(),
    )


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """The instructions for 16-bit arithmetic, as torch and Linux report them. Old releases of torch report few."""
    found: set[str] = set()
    ask = getattr(torch.cpu, "get_capabilities", None)  # from torch 2.11
    if ask is not None:
        found |= {name for name, value in ask().items() if value is True}
    for flag, name in (("avx512_bf16", "_is_avx512_bf16_supported"), ("amx_fp16", "_is_amx_fp16_supported")):
        if getattr(torch.cpu, name, bool)():
            found.add(flag)
    for line in _lines(cpuinfo):
        if line.startswith(("flags", "Features")):
            found |= set(line.partition(":")[2].split())
            break
    return frozenset(found & (CPU_BFLOAT16 | CPU_FLOAT16))


def _cpu_name() -> str:
    named = (line.partition(":")[2].strip() for line in _lines(CPUINFO) if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
