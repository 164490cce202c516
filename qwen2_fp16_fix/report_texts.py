"""The words of scan and its report, by language: both have the same keys and the same placeholders."""

import json
from pathlib import Path

PAGE = Path(__file__).parent / "report" / "template"
TEXTS: dict[str, dict[str, str]] = {
    lang: json.loads((PAGE / f"{lang}.json").read_text(encoding="utf-8")) for lang in ("en", "zh")
}
