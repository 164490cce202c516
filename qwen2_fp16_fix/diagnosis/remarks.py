"""What the doctor says: the name of a sentence and its values, put into English or Chinese at the end."""

from collections.abc import Mapping
from typing import NamedTuple

from ..translations import DOCTOR_TEXTS


class Remark(NamedTuple):
    """A sentence that is not yet in a language."""

    code: str  # a key of DOCTOR_TEXTS
    values: Mapping[str, object]


def remark(code: str, **values: object) -> Remark:
    """The sentence with this code. values: for its placeholders."""
    return Remark(code, values)


def in_words(what: Remark, language: str) -> str:
    """The sentence in a language of DOCTOR_TEXTS."""
    return DOCTOR_TEXTS[language][what.code].format(**what.values)
