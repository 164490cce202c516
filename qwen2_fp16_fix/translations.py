"""The printed texts in English and Chinese, read from `texts/en.json` and `texts/zh.json`.

A file has the same keys in both languages. A text may hold placeholders for `str.format`.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "texts"
LANGUAGES = ("en", "zh")


def read_texts(subject: str) -> dict[str, dict[str, str]]:
    """The texts about one subject by language, then by key."""
    files = {language: (FOLDER / f"{language}.json").read_text(encoding="utf-8") for language in LANGUAGES}
    return {language: json.loads(text)[subject] for language, text in files.items()}


DOCTOR_TEXTS = read_texts("doctor")
SCAN_TEXTS = read_texts("scan")
REPORT_TEXTS = read_texts("report")
