"""The best way to run a Qwen2 on a device, the reason, and the lines of code for it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..checkpoints.config import MODEL_TYPES, dtype_keyword
from ..results import Record
from .checkpoint import CheckpointFacts
from .devices import Device
from .remarks import Remark, in_words, remark

#: The end of an architecture's name, which the Auto class has as well.
TASK = re.compile(r"(For(CausalLM|SequenceClassification|TokenClassification|QuestionAnswering)|Model)$")


CODE_WIDTH = 76  # of a line that fits on a terminal of 80 columns, indented


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
    hardware: Sequence[Device], language: str, release: str, checkpoint: CheckpointFacts | None = None
) -> tuple[list[Recommendation], list[Remark], list[Remark]]:
    """The recommendations, no findings, and a warning if the devices should be used in different ways.

    release: of transformers, for the code. checkpoint: what is loaded; there is no advice if it is not a Qwen2.
    """
    loading = loading_of(checkpoint)
    stock = None if checkpoint is None else checkpoint.stock
    advice = [] if loading is None else advise(hardware, stock is None or stock.weights_fit)
    facts = [
        Recommendation(
            devices=[device.place for device in item.devices],
            name=item.devices[0].name,
            way=item.way,
            needs_fix=WAYS[item.way].needs_fix,
            title=in_words(remark(f"way.{item.way}"), language),
            reason=in_words(item.reason, language),
            code=lines_of_code(item.way, item.devices[0], release, loading, among_others=len(advice) > 1),
            also=[in_words(other, language) for other in item.also],
        )
        for item in advice
    ]
    ways = {item.way for item in advice}
    return facts, [], [remark("device.mixed")] if len(ways) > 1 else []


def advise(found: Sequence[Device], fits_float16: bool = True) -> list[Advice]:
    """Advice for the accelerators, or for the CPU if there are none. Devices of one kind share one.

    fits_float16: whether float16 can hold the weights.
    """
    best = [device for device in found if device.kind != "cpu"] or list(found)
    grouped: dict[tuple[str, str, str, str], list[Device]] = {}
    for device in best:
        way, reason = choose(device)
        if way == "fixed float16" and not fits_float16:
            way, reason = "float32", "reason.weights_over"
        grouped.setdefault((way, reason, device.name, device.generation), []).append(device)
    return [
        Advice(
            tuple(alike),
            way,
            remark(reason, name=name, capability=capability),
            tuple(remark(code) for code in (_also(way, alike[0]) if fits_float16 else [])),
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


class Loading(NamedTuple):
    """How a checkpoint is loaded."""

    auto_class: str = "AutoModelForCausalLM"
    own_code: bool = False  # it carries the fix
    placed: bool = False  # from_pretrained puts it on the device: quantised weights cannot be moved later
    wrapped: bool = False  # a Qwen2 inside another model, whose class is not known here


def loading_of(checkpoint: CheckpointFacts | None) -> Loading | None:
    """How to load a checkpoint; None if it is not a Qwen2."""
    if checkpoint is None:
        return Loading()
    if checkpoint.model_type not in MODEL_TYPES:
        return Loading(wrapped=True) if checkpoint.wrapped else None
    named = (TASK.search(name) for name in checkpoint.architectures)
    task = next((found[0] for found in named if found), "ForCausalLM")
    auto_class = "AutoModel" if task == "Model" else f"AutoModel{task}"
    return Loading(auto_class, checkpoint.exported, placed=checkpoint.quantised is not None)


def lines_of_code(
    way: str,
    device: Device,
    transformers_version: str,
    loading: Loading | None = None,
    among_others: bool = False,
) -> str:
    """Code to paste, for a release of transformers. PATH stands for the checkpoint.

    among_others: other devices here should be used in another way, so the code names this one.
    """
    loading = loading or Loading()
    target = device.place if among_others else device.place.partition(":")[0]
    options = ['"PATH"', f"{dtype_keyword(transformers_version)}=torch.{WAYS[way].dtype}", 'attn_implementation="sdpa"']
    options += ["trust_remote_code=True"] if loading.own_code else []
    options += [f'device_map="{target}"'] if loading.placed else []
    moved = "" if target == "cpu" or loading.placed else f'.to("{target}")'
    fix = ["import qwen2_fp16_fix", "", "qwen2_fp16_fix.register()"]
    if loading.wrapped:
        return "\n".join([*fix, f"# then load PATH as its model card says, with {options[1]}"])
    load = f"model = {loading.auto_class}.from_pretrained({', '.join(options)}){moved}"
    if len(load) > CODE_WIDTH:
        lines = "".join(f"    {option},\n" for option in options)
        load = f"model = {loading.auto_class}.from_pretrained(\n{lines}){moved}"
    needs_register = WAYS[way].takes_fix and not loading.own_code
    return "\n".join(
        ["import torch", f"from transformers import {loading.auto_class}", *(fix if needs_register else [""]), load]
    )
