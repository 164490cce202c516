"""The printed texts in English and Chinese, read from `texts/en.json` and `texts/zh.json`.

A file has the same keys in both languages. A text may hold placeholders for `str.format`.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "texts"
LANGUAGES = ("en", "zh")


def check_language(language: str, refusal: type[Exception]) -> None:
    """Raises `refusal` for a language that there are no texts in."""
    if language not in LANGUAGES:
        raise refusal(f"there is no text in {language!r}: give {' or '.join(LANGUAGES)}.")


def read_texts(subject: str) -> dict[str, dict[str, str]]:
    """The texts about one subject by language, then by key."""
    files = {language: (FOLDER / f"{language}.json").read_text(encoding="utf-8") for language in LANGUAGES}
    return {language: json.loads(text)[subject] for language, text in files.items()}


DOCTOR_TEXTS = read_texts("doctor")
DEMO_TEXTS = read_texts("demo")
VERIFY_TEXTS = read_texts("verify")
SCAN_TEXTS = read_texts("scan")  # of the report as well
