"""Sentences of the doctor: a code and values first, English or Chinese at the end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..results import Record
from ..translations import DOCTOR_TEXTS


class Remark(NamedTuple):
    """A sentence that is not yet in a language."""

    code: str  # a key of DOCTOR_TEXTS
    values: Mapping[str, object]


@dataclass(frozen=True)
class Finding(Record):
    """A sentence about a problem, or a warning of a possible one. code: the same in every language."""

    code: str
    text: str


def remark(code: str, **values: object) -> Remark:
    """The sentence with this code. values: for its placeholders."""
    return Remark(code, values)


def in_words(what: Remark, language: str) -> str:
    """The sentence in a language of DOCTOR_TEXTS."""
    return DOCTOR_TEXTS[language][what.code].format(**what.values)


def as_findings(remarks: Sequence[Remark], language: str) -> list[Finding]:
    """The sentences in a language, with their codes."""
    return [Finding(what.code, in_words(what, language)) for what in remarks]
