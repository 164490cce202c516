"""The best way to run a Qwen2 on a device, the reason, and the lines of code for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..checkpoints.config import dtype_keyword
from ..results import Record
from .devices import Device
from .remarks import Remark, in_words, remark


class Way(NamedTuple):
    """How a model is loaded."""

    dtype: str
    needs_fix: bool  # without it, the model may overflow
    takes_fix: bool  # it changes the numbers


#: By the name that reports use. In float32 the fix changes no bit.
WAYS = {
    "bfloat16": Way("bfloat16", needs_fix=False, takes_fix=True),
    "fixed float16": Way("float16", needs_fix=True, takes_fix=True),
    "float32": Way("float32", needs_fix=False, takes_fix=False),
}


class Advice(NamedTuple):
    """One recommendation for devices that are alike."""

    devices: tuple[Device, ...]
    way: str
    reason: Remark
    also: tuple[Remark, ...]  # what to change for other needs


@dataclass(frozen=True)
class Recommendation(Record):
    """One recommendation in words."""

    devices: list[str]  # as torch names them
    name: str  # of the devices
    way: str  # a key of WAYS
    needs_fix: bool
    title: str
    reason: str
    code: str  # what to paste
    also: list[str]


def recommend(
    hardware: Sequence[Device], language: str, release: str
) -> tuple[list[Recommendation], list[Remark], list[Remark]]:
    """The recommendations, no findings, and a warning if the devices should be used in different ways.

    release: of transformers, for the code.
    """
    advice = advise(hardware)
    facts = [
        Recommendation(
            devices=[device.place for device in item.devices],
            name=item.devices[0].name,
            way=item.way,
            needs_fix=WAYS[item.way].needs_fix,
            title=in_words(remark(f"way.{item.way}"), language),
            reason=in_words(item.reason, language),
            code=lines_of_code(item.way, item.devices[0], release, among_others=len(advice) > 1),
            also=[in_words(other, language) for other in item.also],
        )
        for item in advice
    ]
    ways = {item.way for item in advice}
    return facts, [], [remark("device.mixed")] if len(ways) > 1 else []


def advise(found: Sequence[Device]) -> list[Advice]:
    """Advice for the accelerators, or for the CPU if there are none. Devices of one kind share one."""
    best = [device for device in found if device.kind != "cpu"] or list(found)
    grouped: dict[tuple[str, str, str, str], list[Device]] = {}
    for device in best:
        grouped.setdefault((*choose(device), device.name, device.generation), []).append(device)
    return [
        Advice(
            tuple(alike),
            way,
            remark(reason, name=name, capability=capability),
            tuple(remark(code) for code in _also(way, alike[0])),
        )
        for (way, reason, name, capability), alike in grouped.items()
    ]


def choose(device: Device) -> tuple[str, str]:
    """The way to run on a device, and the code of the sentence that says why."""
    if device.bfloat16:
        return "bfloat16", "reason.cpu_bfloat16" if device.kind == "cpu" else "reason.native_bfloat16"
    if device.kind == "cpu":
        return ("fixed float16", "reason.cpu_float16") if device.float16 else ("float32", "reason.cpu_neither")
    if device.kind == "cuda":
        return "fixed float16", "reason.no_bfloat16" if device.float16 else "reason.slow_float16"
    reasons = {"rocm": "reason.old_amd", "mps": "reason.mps"}
    return "fixed float16", reasons.get(device.kind, "reason.unknown_device")


def _also(way: str, device: Device) -> list[str]:
    if way == "bfloat16":
        return ["also.bfloat16_eager", *(["also.closest"] if device.float16 else [])]
    if way == "float32":
        return ["also.half_the_memory"]
    return ["also.float16_eager", *([] if device.float16 is not False else ["also.float32_if_it_fits"])]


def lines_of_code(way: str, device: Device, transformers_version: str, among_others: bool = False) -> str:
    """Code to paste, for a release of transformers. PATH stands for the checkpoint.

    among_others: other devices here should be used in another way, so the code names this one.
    """
    keyword = dtype_keyword(transformers_version)
    target = device.place if among_others else device.place.partition(":")[0]
    load = f'"PATH", {keyword}=torch.{WAYS[way].dtype}, attn_implementation="sdpa"'
    fix = ["import qwen2_fp16_fix", "", "qwen2_fp16_fix.register()"] if WAYS[way].takes_fix else [""]
    return "\n".join(
        [
            "import torch",
            "from transformers import AutoModelForCausalLM",
            *fix,
            f"model = AutoModelForCausalLM.from_pretrained({load})" + ("" if target == "cpu" else f'.to("{target}")'),
        ]
    )
