"""The doctor's sentences are the same in both languages, and each is said."""

import re
import string
from pathlib import Path

from qwen2_fp16_fix.diagnosis import advice, checkpoint, environment
from qwen2_fp16_fix.diagnosis.answer import BREAKS, code_of
from qwen2_fp16_fix.translations import DOCTOR_TEXTS

RAN = ("ran_all", "ran_all_random", "ran_some", "ran_some_random")
ROOT = Path(__file__).parents[2]


def gaps(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def test_both_languages_have_the_same_sentences_and_placeholders() -> None:
    """A sentence missing in one language, or a gap it does not fill, ends in a KeyError for its readers only."""
    english, chinese = DOCTOR_TEXTS["en"], DOCTOR_TEXTS["zh"]
    assert list(english) == list(chinese)
    for code, text in english.items():
        assert gaps(text) == gaps(chinese[code]), code
        assert not re.search("[一-鿿]", text), code


def test_every_sentence_exists_and_every_text_is_said() -> None:
    """A misspelt code raises when its finding comes up, on the one machine that has it."""
    files = (ROOT / "qwen2_fp16_fix" / "diagnosis").glob("*.py")
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    literal = set(
        re.findall(r'"((?:also|checkpoint|device|fix|lock|reason|self_test|setting|stock|tool|verdict)\.\w+)"', source)
    )
    assert literal <= set(DOCTOR_TEXTS["en"])
    built = {f"way.{way}" for way in advice.WAYS} | {f"tool.{name}" for name in environment.KNOWN}
    built |= {f"quantised.{name}" for name in (*checkpoint.QUANTISATIONS, "other")} | {"lock.none", "lock.kept"}
    built |= {item.text or f"setting.{item.name.rpartition('.')[2]}" for item in environment.settings()}
    built |= {f"matters.{item.matters}" for item in environment.settings()}
    built |= {f"stock.{code}" for code in (*map(code_of, BREAKS), *RAN, "not_finite")}
    pages = {f"page.{code}" for code in re.findall(r"(?:say|heading|findings)\([\"'](\w+)", source)}
    pages |= {f"page.{code}" for code in ("native", "emulated", "unknown", "failed")}
    assert literal | built | pages == set(DOCTOR_TEXTS["en"])
