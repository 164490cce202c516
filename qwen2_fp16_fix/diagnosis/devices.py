"""What there is to compute on, as plain facts that a test can make up."""

import platform
import re
from pathlib import Path
from typing import NamedTuple

import torch

CPU_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"})  # x86's, then ARM's names for it
CPU_FLOAT16 = frozenset({"avx512_fp16", "amx_fp16", "fp16_arith", "asimdhp"})
AMD_BFLOAT16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")  # with matrix instructions for it
FAST_PASCALS = ((5, 3), (6, 0), (6, 2))  # the only ones before Volta whose float16 is not slower than their float32
CPUINFO = Path("/proc/cpuinfo")


class Device(NamedTuple):
    """One device: what it is and what it says about itself."""

    kind: str  # cpu, cuda (NVIDIA), rocm (AMD), mps (Apple), or the name another accelerator has in torch
    place: str  # what torch calls it: cuda:0
    name: str
    capability: tuple[int, int] | None = None  # NVIDIA's compute capability
    architecture: str = ""  # AMD's, as gfx90a; a CPU's, as x86_64
    flags: frozenset[str] = frozenset()  # a CPU's instructions for 16-bit arithmetic
    level: str = ""  # what torch uses of a CPU, as AVX512
    torch_denies_bfloat16: bool = False  # torch says no, emulation not counted
    has_kernels: bool = True  # whether this torch was built for it
    memory: int | None = None  # bytes

    @property
    def generation(self) -> str:
        """NVIDIA's compute capability as it is written: 7.0."""
        return ".".join(map(str, self.capability or ()))

    @property
    def bfloat16(self) -> bool | None:
        """Whether it computes in bfloat16 natively; None where that cannot be told from here."""
        if self.torch_denies_bfloat16:
            return False
        if self.kind == "cuda":
            return self.capability is not None and self.capability >= (8, 0)
        if self.kind == "rocm":
            return self.architecture.startswith(AMD_BFLOAT16)
        if self.kind == "mps":  # M1 and M2 go by way of float32
            return False if re.search(r"\bM[12]\b", self.name) else None
        return bool(self.flags & CPU_BFLOAT16) if self.kind == "cpu" else None

    @property
    def float16(self) -> bool | None:
        """Whether it computes in float16 natively, and not slower than in float32; None where that cannot be told."""
        if self.kind == "cuda":
            return self.capability is not None and (self.capability >= (7, 0) or self.capability in FAST_PASCALS)
        if self.kind in ("rocm", "mps"):
            return True
        return bool(self.flags & CPU_FLOAT16) if self.kind == "cpu" else None


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
    """What torch says without emulation. Releases that cannot leave it out are not asked: they say yes to a T4."""
    with torch.cuda.device(index):
        try:
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        except TypeError:
            return True


def has_kernels(built_for: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for `built_for` (sm_70, sm_90a, compute_90, …) runs on a card of this capability.

    Machine code runs on its own major version from its minor on, PTX on everything newer.
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
    """The instructions for 16-bit arithmetic that torch reports, and those that Linux does: old torch reports few."""
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
