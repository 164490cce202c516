"""A scan in words: both languages say the same, and a token is printed as it stands."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import qwen2_fp16_fix
from qwen2_fp16_fix.activations.sites import ENDS, SITES
from qwen2_fp16_fix.scanning import sentences
from qwen2_fp16_fix.translations import REPORT_TEXTS, SCAN_TEXTS
from tests.scanning.planted import with_tokens

SHOWING = (".py", ".html", ".css", ".js")  # the files of a room that may name a text

pytestmark = pytest.mark.xdist_group("scan")  # one worker builds the checkpoints, for all


def test_findings_are_json_and_are_rendered_in_both_languages(
    scans: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, fixed in (("scores", False), ("swiglu", False), ("massive", False), ("keys", True)):
        found = scans(kind, fixed)
        assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()
        for lang in sentences.LANGUAGES:
            Console(width=160).print(sentences.rendered(found, lang))
            assert " ".join(sentences.verdict(found, lang).split()) in " ".join(capsys.readouterr().out.split())
    assert "All of them are raw scores" in " ".join(sentences.consequences(scans("scores")))


def test_a_token_that_is_markup_to_rich_is_printed_as_it_stands(
    scans: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer with a token `[/INST]` ended in rich's MarkupError, after the run; `[b]` was swallowed."""
    for token in ("[/INST]", "[b]", ":smile:"):
        Console(width=200).print(with_tokens(scans("scores"), token))
        assert f"`{token}`" in capsys.readouterr().out


def test_every_text_is_used() -> None:
    """A text that nothing shows is one that nobody keeps true."""
    package = Path(qwen2_fp16_fix.__file__).parent
    files = [file for room in ("scanning", "report") for file in (package / room).rglob("*") if file.suffix in SHOWING]
    sources = "".join(file.read_text(encoding="utf-8") for file in files)
    texts = SCAN_TEXTS["en"] | REPORT_TEXTS["en"]
    for kind in ("site", "words"):
        assert {key for key in texts if key.startswith(f"{kind}_")} == {f"{kind}_{name}" for name in (*SITES, *ENDS)}
    for key in [key for key in texts if not key.startswith(("site_", "words_"))]:
        name = re.sub(r"^(column|term|what|verdict|row)_|_(title|caption|stock|fixed)$", "", key).removesuffix("_text")
        assert re.search(rf"\b{name}\b|_{name}\b", sources), key
