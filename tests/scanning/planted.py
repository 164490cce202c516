"""The checkpoints that the tests of the scan share: what is planted in them, and the prompt that meets it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from typer.testing import CliRunner

import qwen2_fp16_fix
from qwen2_fp16_fix.cli import commands
from qwen2_fp16_fix.files.packaged import DEMO_CHECKPOINT
from qwen2_fp16_fix.scanning.result import MeasuredSite, ScanResult
from tests import stress
from tests.stress import TINY, random_prompt

PROMPT = random_prompt(TINY, 1, 48, seed=7) % 90  # which the tokenizer below has letters for


HALF = TINY.head_dim // 2


LAST = TINY.layers - 1


#: Where stress.py breaks float16 by construction: layer, site, channel, and the token id that carries the marker.
BREAKS: dict[str, tuple[int, str, int, int | None]] = {
    "scores": (0, "raw_scores", HALF - 1, None),
    "residual": (2, "residual", 1, 1 + stress.MARKED.index("residual")),
    "swiglu": (2, "down_proj", 3, 1 + stress.MARKED.index("swiglu")),
}


#: Where the kinds that stay finite have their largest down_proj output.
MASSIVE = {"massive": (2, 1, 11_885.0), "moe57": (2, 1, 50_000.0)}


#: Channels of a head that hold the spikes of the kinds that only lose accuracy.
SPIKED = {"keys": {HALF - 2}, "keys_fast": {int(0.75 * HALF), int(0.625 * HALF)}}


def write_tokenizer(folder: Path) -> None:
    """Token 0 is `!`, as in the real tokenizer, and every printable ASCII letter is a token."""
    model = {"type": "BPE", "vocab": {chr(33 + number): number for number in range(94)}, "merges": []}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    parts = {"model": model, "pre_tokenizer": level, "decoder": level, "version": "1.0", "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    own = DEMO_CHECKPOINT / "tokenizer_config.json"
    (folder / "tokenizer_config.json").write_bytes(own.read_bytes())


def text_of(ids: Tensor) -> str:
    """The text that the tokenizer reads as these ids."""
    return "".join(chr(33 + number) for number in ids.flatten().tolist())


def site(found: ScanResult, layer: int | None, name: str) -> MeasuredSite:
    """What was measured at a site."""
    return next(site for site in found.sites if (site.layer, site.site) == (layer, name))


def with_tokens(found: ScanResult, token: str, **changes: Any) -> ScanResult:
    """The same scan with `token` wherever it names one."""

    def renamed(each: Any) -> Any:
        if each is None or each.where is None:
            return each
        key = None if each.where.key_token is None else token
        return replace(each, where=replace(each.where, token=token, key_token=key))

    return replace(
        found,
        sites=tuple(map(renamed, found.sites)),
        massive_activations=tuple(map(renamed, found.massive_activations)),
        first_nonfinite=renamed(found.first_nonfinite),
        **changes,
    )


def command(*arguments: object) -> Any:
    """Runs the command `scan` in this process."""
    return CliRunner().invoke(commands.app, ["scan", "--device", "cpu", *map(str, arguments)])


def refused(*arguments: object) -> str:
    """The sentence with which the command refuses."""
    done = command(*arguments)
    assert isinstance(done.exception, qwen2_fp16_fix.Qwen2FP16FixError), (done.exception, done.output)
    assert "\n" not in str(done.exception)
    return str(done.exception)
