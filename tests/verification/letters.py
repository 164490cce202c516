"""A checkpoint and a text of letters that the tests of verify share."""

from pathlib import Path
from typing import Any

import torch

import qwen2_fp16_fix
from qwen2_fp16_fix.verification.result import VerificationResult, VerifiedRow
from tests.stress import TINY, build

CPU = torch.device("cpu")
SHORT: dict[str, Any] = {"window": 24, "stride": 12, "tokens": 60, "device": "cpu"}
TEXT = "".join(chr(32 + number * 37 % 90) for number in range(200))


def tokenizer(text: str, return_tensors: str) -> dict[str, torch.Tensor]:
    """A letter is a token."""
    return {"input_ids": torch.tensor([[ord(letter) % TINY.vocab for letter in text]])}


def tiny(folder: Path, *kinds: str) -> Path:
    """A tiny checkpoint, written into the folder."""
    build(TINY, kinds).half().save_pretrained(folder)
    return folder


def table(folder: Any, **options: Any) -> VerificationResult:
    """A verification of the text, by letters."""
    return qwen2_fp16_fix.verify(folder, TEXT, tokenizer=tokenizer, **{**SHORT, **options})


def row(findings: VerificationResult, name: str) -> VerifiedRow:
    """The row of that name."""
    return next(row for row in findings.rows if row.name == name)
