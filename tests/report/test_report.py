"""The report in a browser: by keyboard, in a dark theme, on a phone and on paper, and without a network."""

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import qwen2_fp16_fix
from qwen2_fp16_fix.activations.sites import SITES
from qwen2_fp16_fix.files.packaged import DEMO_CHECKPOINT
from qwen2_fp16_fix.report import picture, style
from qwen2_fp16_fix.report.files import ScanFiles, read_verification
from qwen2_fp16_fix.report.page import page
from qwen2_fp16_fix.report.style import PALETTE
from qwen2_fp16_fix.scanning import sentences
from qwen2_fp16_fix.scanning.result import CacheLosses, ScannedPrompt, ScanResult
from qwen2_fp16_fix.verification import rows, verify
from tests.scanning.planted import with_tokens
from tests.stress import TINY, build, random_prompt

pytestmark = pytest.mark.xdist_group("report")  # one worker starts the browser, for all

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>"
VERIFICATION: dict[str, Any] = {
    "settings": {"tokens": 60, "window": 24},
    "rows": [
        {
            "name": f"{kind} float16 eager",
            "finite": kind == "fixed",
            "perplexity": 18.5 if kind == "fixed" else None,
            "drift": -1e-5 if kind == "fixed" else None,
            "kl_mean": 1e-6 if kind == "fixed" else None,
            "kl_max": 2e-6 if kind == "fixed" else None,
            "top1_agreement": 1.0 if kind == "fixed" else None,
            "largest_logit_difference": 0.01 if kind == "fixed" else None,
            "first_overflow": None if kind == "fixed" else "layer 0, raw scores q·k",
        }
        for kind in ("stock", "fixed")
    ],
}


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> list[ScanResult]:
    """Stock's and fixed's, of a checkpoint with everything planted."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build(TINY, ("scores", "residual", "swiglu", "massive")).half().save_pretrained(folder)
    ids = [random_prompt(TINY, 1, 40, seed=1), random_prompt(TINY, 1, 12, seed=2)]
    return [qwen2_fp16_fix.scan(folder, ids, fixed=fixed, device="cpu") for fixed in (False, True)]


@pytest.fixture(scope="module")
def reports(scans: list[ScanResult], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page in each language."""
    folder = tmp_path_factory.mktemp("report")
    for lang in sentences.LANGUAGES:
        (folder / f"{lang}.html").write_text(page(scans, VERIFICATION, lang), encoding="utf-8")
    return {lang: folder / f"{lang}.html" for lang in sentences.LANGUAGES}


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


class Visit:
    """A page that is open, with all it said and asked for."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, file: Path) -> Any:
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-ready=yes]", timeout=15_000)
        return self.page


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    visits: list[Visit] = []

    def start(**options: Any) -> Visit:
        visits.append(Visit(browser, **options))
        return visits[-1]

    yield start
    for one in visits:
        one.context.close()


DRAWN = """() => Object.fromEntries([...document.querySelectorAll('.chart')].map((chart) => [chart.id, {
  height: chart.querySelector('svg.main-svg').getBoundingClientRect().height,
  traces: chart.data.map(({type, x, y, z, text, name}) => ({type, x, y, z, text, name})),
  ink: chart.layout.font.color,
  width: chart.querySelector('svg.main-svg').getBoundingClientRect().width,
  points: chart.querySelectorAll('.point, .hm image').length}]))"""


def comes_true(opened: Any, expression: str) -> None:
    """Waits for it; playwright's own waiting evaluates strings, which the page's security policy forbids."""
    for _ in range(100):
        if opened.evaluate(expression):
            return
        opened.wait_for_timeout(50)
    pytest.fail(f"never true: {expression}")


@pytest.mark.parametrize("lang", sentences.LANGUAGES)
def test_it_opens_from_a_file_without_messages_or_requests(
    visit: Callable[..., Visit], reports: dict[str, Path], lang: str
) -> None:
    one = visit()
    opened = one.open(reports[lang])
    assert one.said == []
    assert [url for url in one.asked if not url.startswith(("data:", "blob:"))] == [reports[lang].as_uri()]
    assert opened.evaluate("document.documentElement.lang") == {"en": "en", "zh": "zh-CN"}[lang]
    assert opened.locator("h1").count() == 1
    levels = [
        int(tag[1]) for tag in opened.evaluate("[...document.querySelectorAll('h1,h2,h3')].map((h) => h.tagName)")
    ]
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_the_charts_have_their_data(
    visit: Callable[..., Visit], reports: dict[str, Path], scans: list[ScanResult]
) -> None:
    """What is drawn is what was measured, chart by chart."""
    charts = visit().open(reports["en"]).evaluate(DRAWN)
    assert set(charts) == {f"chart-{name}" for name in ("headroom", "residual", "spikes", "against", "int8")}
    assert all(chart["height"] > 150 and chart["points"] for chart in charts.values())
    stock, fixed = scans
    by_place = {(site.layer, site.site): site for site in stock.sites}
    (cells,) = charts["chart-headroom"]["traces"]
    assert cells["y"] == [str(layer) for layer in range(TINY.layers)]
    assert cells["x"] == [sentences.site_name(name) for name in SITES]
    for layer, row in enumerate(cells["text"]):
        for name, text in zip(SITES, row, strict=True):
            bits = by_place[layer, name].headroom_bits
            assert float(text.removeprefix("✗ ").replace("−", "-")) == pytest.approx(bits, abs=0.051)
            assert text.startswith("✗") == (bits < 0)
    for trace, scan in zip(charts["chart-residual"]["traces"], scans, strict=False):
        assert trace["y"] == [site.largest for site in scan.sites if site.site == "residual"]
    drawn = [y for trace in charts["chart-spikes"]["traces"] for y in trace["y"]]
    assert sorted(drawn) == sorted(abs(spike.bias) for spike in stock.bias_spikes)
    losses = [y for trace in charts["chart-int8"]["traces"][:4] for y in trace["y"]]
    assert sorted(losses) == sorted(found.int8_loss for found in stock.quantisation.linear_inputs)
    ends = {trace["name"]: trace for trace in charts["chart-against"]["traces"] if trace["name"]}
    least = min(site.headroom_bits for site in fixed.sites if site.site == "down_proj")
    at = ends["fixed float16"]["y"].index("down_proj")
    assert ends["fixed float16"]["x"][at] == pytest.approx(least)


def test_the_verdict_and_the_tables_say_what_was_found(
    visit: Callable[..., Visit], reports: dict[str, Path], scans: list[ScanResult]
) -> None:
    opened = visit().open(reports["en"])
    shown = opened.locator(".verdict").all_inner_texts()
    assert [text.split("\n")[0] for text in shown] == ["✗ Breaks", "✓ Finite"]
    for text, scan in zip(shown, scans, strict=True):
        assert sentences.verdict(scan).replace("`", "") in " ".join(text.split())
    for name, scan in zip(("stock", "fixed"), scans, strict=True):
        assert opened.locator(f"#numbers-{name} tbody tr").count() == len(scan.sites)
    assert opened.locator("#numbers-stock tr.bad").count() == len(scans[0].past_limit) > 4
    assert "18.5000" in opened.locator("#verify-table tr:not(.bad)").last.inner_text()
    assert "NaN" in opened.locator("#verify-table tr.bad").inner_text()
    assert opened.locator("table caption").count() == opened.locator("table").count() == 6
    versions = opened.locator("dl.plain").last.inner_text()
    assert all(getattr(scans[0].versions, name) in versions for name in ("package", "transformers", "torch"))


def test_everything_is_reached_by_keyboard(visit: Callable[..., Visit], reports: dict[str, Path]) -> None:
    """Tab alone reaches the skip link and every table, what has the focus shows it, and arrows scroll there."""
    opened = visit(viewport={"width": 800, "height": 700}).open(reports["en"])
    reached: list[str] = []
    for _ in range(20):
        opened.keyboard.press("Tab")
        found = opened.evaluate(
            """() => { const e = document.activeElement, s = getComputedStyle(e);
            return [e.className + ' ' + (e.getAttribute('aria-labelledby') || ''), s.outlineStyle, s.outlineWidth,
                    e.getBoundingClientRect().left >= 0] }"""
        )
        if found[0].strip():
            assert found[1:] == ["solid", "3px", True], found
            if found[0] in reached:
                break
            reached.append(found[0])
    tables = opened.evaluate("[...document.querySelectorAll('.scroll')].map((e) => e.getAttribute('aria-labelledby'))")
    assert reached[0].startswith("skip")
    assert [name.split()[-1] for name in reached[1:]] == tables
    region = opened.locator("[aria-labelledby=numbers-stock-caption]")
    region.focus()
    opened.keyboard.press("End")
    comes_true(opened, "document.activeElement.scrollTop > 50")
    opened.locator(".skip").focus()
    opened.keyboard.press("Enter")
    comes_true(opened, "location.hash === '#numbers'")


def test_pictures_and_regions_have_names(visit: Callable[..., Visit], reports: dict[str, Path]) -> None:
    opened = visit().open(reports["zh"])
    unnamed = """() => [...document.querySelectorAll('[role=img],[role=region],section,figure,[aria-labelledby]')]
      .filter((e) => !(e.getAttribute('aria-label') ||
        document.getElementById(e.getAttribute('aria-labelledby') || '')?.textContent.trim()))
      .map((e) => e.outerHTML.slice(0, 80))"""
    assert opened.evaluate(unnamed) == []
    heads = "[...document.querySelectorAll('th')].every((e) => ['row', 'col'].includes(e.scope))"
    assert opened.evaluate(heads)


def test_the_page_fits_a_phone_follows_the_theme_and_prints_on_white(
    visit: Callable[..., Visit], reports: dict[str, Path], tmp_path: Path
) -> None:
    """Nothing sticks out of a narrow page, charts follow the theme, and paper is white, with charts of its width."""
    one = visit(viewport={"width": 360, "height": 740}, color_scheme="dark")
    opened = one.open(reports["en"])
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
    charts = opened.evaluate(DRAWN)
    assert {chart["ink"] for chart in charts.values()} == {PALETTE["ink"]["dark"]}
    assert max(chart["width"] for chart in charts.values()) <= 360
    assert {text for row in charts["chart-headroom"]["traces"][0]["text"] for text in row} == {"", "✗"}
    opened.emulate_media(color_scheme="light")
    comes_true(opened, f"document.getElementById('chart-int8').layout.font.color == '{PALETTE['ink']['light']}'")
    opened.emulate_media(color_scheme="dark")
    inks = """() => { window.inks = []; addEventListener('beforeprint', () => {
      const {font, width} = document.getElementById('chart-int8').layout; inks.push(font.color, width) }) }"""
    opened.evaluate(inks)
    assert opened.pdf(path=tmp_path / "page.pdf").startswith(b"%PDF")
    assert opened.evaluate("window.inks") == [PALETTE["ink"]["light"], 680]
    assert one.said == []


def test_a_token_that_is_markup_stays_text(
    visit: Callable[..., Visit], scans: list[ScanResult], tmp_path: Path
) -> None:
    """Tokens, prompts and names come from whoever wrote the checkpoint."""
    prompts = (ScannedPrompt(EVIL, 40), ScannedPrompt(None, 12))
    poisoned = [with_tokens(scan, EVIL, checkpoint=EVIL.replace("/", ""), prompts=prompts) for scan in scans]
    verification = json.loads(json.dumps(VERIFICATION))
    verification["rows"][0]["name"] = EVIL
    (tmp_path / "page.html").write_text(page(poisoned, verification), encoding="utf-8")
    one = visit()
    opened = one.open(tmp_path / "page.html")
    assert "owned" not in opened.title().replace(EVIL.replace("/", ""), "")
    assert opened.locator("img").count() == 0
    assert one.said == []


def test_without_javascript_the_tables_are_there(visit: Callable[..., Visit], reports: dict[str, Path]) -> None:
    one = visit(java_script_enabled=False)
    one.page.goto(reports["en"].as_uri())
    assert one.page.locator("#numbers-stock tbody tr").count() > 60
    assert "The charts need JavaScript" in one.page.locator("footer").inner_text()


@pytest.mark.parametrize("kinds", [(), ("massive",)])
def test_one_scan_alone_makes_a_page(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    """Without spikes, without massive activations, without a fixed scan: what is not there is left out, or said so."""
    build(TINY, kinds).half().save_pretrained(tmp_path)
    for fixed in (False, True):
        scan = qwen2_fp16_fix.scan(tmp_path, [random_prompt(TINY, 1, 9)], fixed=fixed, device="cpu")
        for lang in sentences.LANGUAGES:
            html = page([scan], None, lang)
            assert 'id="chart-spikes"' not in html
            assert 'id="chart-against"' not in html
            assert 'id="verify-table"' not in html
            assert ('id="massive-table"' in html) == bool(kinds)


def test_the_current_folder_has_a_name(scans: list[ScanResult], tmp_path: Path, monkeypatch: Any) -> None:
    """`scan .` made a page without a heading."""
    (tmp_path / "Qwen2-7B").mkdir()
    monkeypatch.chdir(tmp_path / "Qwen2-7B")
    assert re.search("<h1>[^<]*Qwen2-7B", page([replace(scans[0], checkpoint=".")]))


def test_a_scan_of_nan_makes_a_page_and_a_picture(scans: list[ScanResult], tmp_path: Path) -> None:
    sites = tuple(
        replace(site, largest=None, headroom_bits=None) if site.layer is None or site.layer > 1 else site
        for site in scans[0].sites
    )
    lost = replace(
        scans[0].quantisation,
        linear_inputs=tuple(replace(found, int8_loss=None) for found in scans[0].quantisation.linear_inputs),
        cache=tuple(CacheLosses(found.layer, None, None, None) for found in scans[0].quantisation.cache),
    )
    broken = replace(scans[0], sites=sites, quantisation=lost)
    assert "not finite" in page([broken])
    picture.draw([broken], tmp_path / "out.png")


def test_the_page_is_small_and_whole(reports: dict[str, Path]) -> None:
    """One file that a mail takes: plotly.js alone is 5 MB unpacked."""
    html = reports["en"].read_text(encoding="utf-8")
    assert len(html) < 2.5e6
    assert "http://" not in html
    assert "https://" not in html
    assert "src=" not in html


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast(theme: str) -> None:
    """At least 4.5 to 1 for text, 3 to 1 for lines and dots of charts (WCAG 2.2, 1.4.3 and 1.4.11)."""
    for name, colours in PALETTE.items():
        for ground in ("panel", "ground"):
            if name not in ("panel", "ground", "line"):
                pair = sorted((luminance(colours[theme]), luminance(PALETTE[ground][theme])))
                least = 3 if name in ("stock", "fixed", "third", "fourth") else 4.5
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= least, (name, ground)


def test_the_picture_is_a_described_png(
    scans: list[ScanResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a letter that the font lacks is a warning and an empty box
        written = ScanFiles(png=tmp_path / "out.png").write(scans, None)
    assert written == [tmp_path / "out.png"]
    data = written[0].read_bytes()
    assert data.startswith(b"\x89PNG")
    with Image.open(written[0]) as image:
        assert image.info["Description"].startswith("✗ Stock float16 (eager) breaks first in layer")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert width == 1600
    assert height > 800
    monkeypatch.setattr(picture, "CHINESE_FONTS", ("No Such Font",))
    with pytest.raises(qwen2_fp16_fix.ScanError, match="no font here has Chinese letters for the PNG: install"):
        ScanFiles(png=tmp_path / "zh.png", lang="zh").check(force=False)


def test_a_token_of_dollars_is_no_formula_in_the_picture(scans: list[ScanResult], tmp_path: Path) -> None:
    """matplotlib sets what stands between dollars as mathematics, and raised: after the run, no picture."""
    picture.draw([with_tokens(scans[0], "$^$")], tmp_path / "out.png")


def test_axes_have_ticks_between_their_ends() -> None:
    for values in ([65504.0, 70000.0], [1.0, 1e9], [None, 3e-4, 0.1], [5.0], [None]):
        low, high, ticks = style.log_ticks(values)
        known = [math.log10(value) for value in values if value]
        assert ticks
        assert all(low <= value <= high for value in [*known, *map(math.log10, ticks)])


def test_a_report_reads_what_verify_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's keys are verify's own: here of a real run, so that the two cannot part."""
    few = [rows.ORACLE, *(rows.Row("float16", "eager", fixed) for fixed in (False, True))]
    monkeypatch.setattr(verify, "planned_rows", lambda device: few)
    monkeypatch.setattr(rows, "NEW_TOKENS", 2)
    found = qwen2_fp16_fix.verify(DEMO_CHECKPOINT, window=16, stride=8, tokens=17, device="cpu")
    (tmp_path / "verify.json").write_text(json.dumps(found.to_dict()))
    assert read_verification(tmp_path / "verify.json") == found.to_dict()
