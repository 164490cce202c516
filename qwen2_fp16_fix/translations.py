"""The printed texts in English and Chinese, read from `texts/en.json` and `texts/zh.json`.

A file has the same keys in both languages. A text may hold placeholders for `str.format`.
"""

import json
import math
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
SCAN_TEXTS = read_texts("scan")
REPORT_TEXTS = read_texts("report")
CERTIFY_TEXTS = read_texts("certify")


def number_text(value: float | None, language: str = "en") -> str:
    """A number as every text writes it: 65,504 from 100 to a million, else three digits, as 62.7 or 1.2e+09.

    A count, which is an int, is written with all its digits. None stands for a number that is not finite.
    """
    if value is None or not math.isfinite(value):
        return SCAN_TEXTS[language]["not_finite"]
    return f"{value:,.0f}" if isinstance(value, int) or 100 <= abs(value) < 1e6 else f"{value:.3g}"
