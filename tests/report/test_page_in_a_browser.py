"""The page in Chromium: by keyboard, in a dark theme, on a phone and on paper, without a network, and through axe."""

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from qwen2_fp16_fix.report import card
from qwen2_fp16_fix.report.page import page
from qwen2_fp16_fix.report.style import PALETTE
from qwen2_fp16_fix.scanning.result import ScannedPrompt, ScanResult
from tests.report.made_up import VERIFICATION
from tests.scanning.planted import with_tokens

pytestmark = pytest.mark.xdist_group("report")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium of the system's, without a window."""
    from playwright.sync_api import sync_playwright

    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.fail("these tests look at the report in Chromium, which is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=list(QUIET))
        yield running
        running.close()


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a page from a file. At the end it has printed nothing, and asked for nothing but itself."""
    contexts: list[Any] = []
    said: list[str] = []
    asked: list[str] = []
    file = tmp_path / "page.html"

    def open_page(html: str, **options: Any) -> Any:
        file.write_text(html, encoding="utf-8")
        contexts.append(browser.new_context(**options))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(file.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {file.as_uri()}


def comes_true(tab: Any, expression: str) -> None:
    """Waits for it; playwright's own waiting evaluates strings, which the page's security policy forbids."""
    for _ in range(100):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(20)
    pytest.fail(f"never true: {expression}")


def colour_of(tab: Any, selector: str, name: str) -> str:
    """A colour that the browser uses, as hexadecimal digits."""
    read = f"getComputedStyle(document.querySelector('{selector}')).{name}.match(/\\d+/g).map(Number)"
    return "#" + "".join(f"{part:02x}" for part in tab.evaluate(read)[:3])


def test_axe_finds_nothing_and_a_keyboard_reaches_everything(opened: Open, scans: list[ScanResult]) -> None:
    """Tab alone reaches the button, every table and every chart's values; what has the focus shows it."""
    tab = opened(page(scans, VERIFICATION, "zh"), viewport={"width": 900, "height": 700})
    for closed in tab.locator("details").all():
        closed.evaluate("element => { element.open = true }")
    for theme, rules in (("light", None), ("dark", {"runOnly": ["color-contrast"]})):
        tab.emulate_media(color_scheme=theme)
        some = {"exclude": [[".scroll tr:nth-child(n+8)"]]}  # rows like those before, which cost seconds
        found = Axe().run(tab, context=some, options=rules).response["violations"]
        assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
    assert tab.evaluate("document.documentElement.lang") == "zh-CN"
    levels = [int(tag[1]) for tag in tab.evaluate("[...document.querySelectorAll('h1,h2,h3')].map((h) => h.tagName)")]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    reached = []
    for _ in range(30):
        tab.keyboard.press("Tab")
        name, *shown = tab.evaluate(
            """() => { const e = document.activeElement, s = getComputedStyle(e);
            return [e.getAttribute('aria-labelledby') || e.className || e.tagName, s.outlineStyle, s.outlineWidth,
                    e.getBoundingClientRect().left >= 0] }"""
        )
        if name == "BODY":
            break
        assert shown == ["solid", "3px", True], name
        reached.append(name)
    regions = tab.evaluate("[...document.querySelectorAll('.scroll')].map((e) => e.getAttribute('aria-labelledby'))")
    assert reached[:3] == ["skip", "PRE", "copy"]
    assert [name for name in reached[3:] if name != "SUMMARY"] == regions
    assert reached.count("SUMMARY") == 4
    tab.locator("[aria-labelledby=numbers-table-caption]").focus()
    tab.keyboard.press("End")
    comes_true(tab, "document.activeElement.scrollTop > 50")
    tab.locator(".skip").focus()
    tab.keyboard.press("Enter")
    comes_true(tab, "location.hash === '#numbers'")


def test_the_button_copies_and_the_page_fits_a_phone_follows_the_theme_and_prints_on_white(
    opened: Open, scans: list[ScanResult], tmp_path: Path
) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "color_scheme": "dark"}
    tab = opened(page(scans, VERIFICATION), permissions=["clipboard-read", "clipboard-write"], **phone)
    tab.locator("button.copy").tap()
    comes_true(tab, "document.getElementById('copied').textContent === 'Copied'")
    assert tab.evaluate("navigator.clipboard.readText()") == card.CODE
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    sticking = """[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, pre'))
      .filter((e) => e.getBoundingClientRect().right > 390).map((e) => e.outerHTML.slice(0, 80))"""
    assert tab.evaluate(sticking) == []
    assert tab.locator(".chart .narrow svg").first.is_visible()
    assert not tab.locator(".chart .wide svg").first.is_visible()
    numbers = (
        "[...document.querySelectorAll('#map-stock td')].every((e) => e.textContent.trim().match(/^[−<]?[0-9.]+$/))"
    )
    assert tab.evaluate(numbers)
    for theme in ("dark", "light"):
        tab.emulate_media(color_scheme=theme)
        assert colour_of(tab, ".narrow text", "fill") == PALETTE["ink"][theme]
        assert colour_of(tab, "body", "backgroundColor") == PALETTE["ground"][theme]
    tab.emulate_media(color_scheme="dark", media="print")
    assert colour_of(tab, ".wide text", "fill") == PALETTE["ink"]["light"]
    assert tab.locator(".chart .wide svg").first.is_visible()
    assert tab.pdf(path=tmp_path / "page.pdf").startswith(b"%PDF")


def test_a_token_that_is_markup_stays_text_and_tables_need_no_javascript(opened: Open, scans: list[ScanResult]) -> None:
    """Tokens, prompts and names come from whoever wrote the checkpoint."""
    prompts = (ScannedPrompt(EVIL, 40), ScannedPrompt(None, 12))
    poisoned = [with_tokens(scan, EVIL, checkpoint=EVIL.replace("/", ""), prompts=prompts) for scan in scans]
    verification = json.loads(json.dumps(VERIFICATION))
    verification["rows"][0]["name"] = EVIL
    html = page(poisoned, verification)
    for javascript in (True, False):
        tab = opened(html, java_script_enabled=javascript)
        assert "owned" not in tab.title().replace(EVIL.replace("/", ""), "")
        assert tab.locator("img").count() == 0
        assert tab.locator("#numbers-table tbody tr").count() > 60
        assert tab.locator("button.copy").is_visible() == javascript
