"""Every text is there in both languages, with the same placeholders."""

import json
import string

import pytest

from qwen2_fp16_fix import demo, errors
from qwen2_fp16_fix.activations.sites import ENDS, SITES, place_text
from qwen2_fp16_fix.translations import FOLDER, LANGUAGES

TEXTS = {language: json.loads((FOLDER / f"{language}.json").read_text(encoding="utf-8")) for language in LANGUAGES}


def fields(text: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}


@pytest.mark.parametrize("subject", TEXTS["en"])
def test_both_languages_have_the_same_keys_and_placeholders(subject: str) -> None:
    """What one language lacks ends in a KeyError for its readers only."""
    english, chinese = TEXTS["en"][subject], TEXTS["zh"][subject]
    assert list(english) == list(chinese)
    for key, text in english.items():
        assert fields(text) == fields(chinese[key]), key
        assert bool(text.strip()) == bool(chinese[key].strip()), key
    assert TEXTS["en"].keys() == TEXTS["zh"].keys()


def test_places_have_a_name_in_each_language() -> None:
    for title in SITES.values():
        assert place_text(f"layer 3, {title}", "en") == f"layer 3, {title}"
        assert place_text(f"layer 3, {title}", "zh").startswith("第 3 层，")
        assert title in ("q", "k", "v") or place_text(f"layer 3, {title}", "zh") != f"第 3 层，{title}"
    for end in ENDS.values():
        assert place_text(end, "zh") in TEXTS["zh"]["scan"].values()


def test_a_language_that_there_is_not_is_one_sentence() -> None:
    with pytest.raises(errors.CheckpointError, match="there is no text in 'fr': give en or zh"):
        demo.measure(language="fr")
