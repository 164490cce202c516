"""What a report says and draws: its first card, its charts and tables, its size, and the picture."""

import json
import math
import re
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

import qwen2_fp16_fix
from qwen2_fp16_fix.errors import ScanError
from qwen2_fp16_fix.files.packaged import DEMO_CHECKPOINT
from qwen2_fp16_fix.patches.range_plan import FLOAT16_MAX
from qwen2_fp16_fix.report import card, charts, drawing, picture, style, tables
from qwen2_fp16_fix.report.files import ScanFiles
from qwen2_fp16_fix.report.page import page
from qwen2_fp16_fix.scanning.result import CacheLosses, ScanResult
from qwen2_fp16_fix.translations import number_text
from qwen2_fp16_fix.verification import rows, verify
from qwen2_fp16_fix.verification.saved import read_saved
from tests.report.made_up import VERIFICATION, enlarged
from tests.scanning.planted import with_tokens
from tests.stress import TINY, build, random_prompt

pytestmark = pytest.mark.xdist_group("report")  # one worker scans, and starts the browser, for all
PEN = charts.Pen("en", style.LIGHT, str)


@pytest.fixture(scope="module")
def html(scans: list[ScanResult]) -> str:
    """The page in English, as text."""
    return page(scans, VERIFICATION)


def drawn(draw: Any, *measured: Any) -> Any:
    """The axes of a chart."""
    axes = Figure().subplots()
    draw(axes, *measured, PEN)
    return axes


def test_the_stock_line_ends_at_the_limit_and_the_fixed_one_goes_on(scans: list[ScanResult]) -> None:
    """Both lines crossed the limit at one place, as if the fix had failed."""
    stock, fixed = scans
    over = charts.first_over(stock)
    assert over == next(site.layer for site in style.residuals(stock) if site.largest > FLOAT16_MAX)
    axes = drawn(charts.residual_stream, scans)
    lines = {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}
    assert list(lines["stock float16"].get_xdata()) == list(range(over))
    assert max(lines["stock float16"].get_ydata()) < FLOAT16_MAX
    assert list(lines["fixed float16"].get_ydata()) == [site.largest for site in style.residuals(fixed)]
    (cross,) = [line for line in axes.get_lines() if line.get_marker() == "X"]
    assert (list(cross.get_xdata()), list(cross.get_ydata())) == ([over], [FLOAT16_MAX])
    assert [text.get_text() for text in axes.texts] == ["✗ infinite from here on", "kept in fp32"]
    assert {tick.get_text() for tick in axes.get_xticklabels()} == set(map(str, range(TINY.layers)))


def test_the_charts_have_their_data(scans: list[ScanResult]) -> None:
    """What is drawn, and what the table below it says, is what was measured."""
    stock, fixed = scans
    points = {line.get_label(): line.get_ydata() for line in drawn(charts.spikes, stock).get_lines()}
    assert sorted(abs(spike.bias) for spike in stock.bias_spikes) == sorted([*points["k_proj"], *points["q_proj"]])
    losses = [y for line in drawn(charts.int8_losses, stock).get_lines()[:4] for y in line.get_ydata()]
    assert sorted(losses) == sorted(found.int8_loss for found in stock.quantisation.linear_inputs)
    least = min(site.headroom_bits for site in fixed.sites if site.site == "down_proj")
    row = next(row for row in tables.against_table(scans, "en").rows if row.cells[0] == "down_proj")
    assert row.cells[2] == style.signed(least)
    values = [row.cells for row in tables.residual_table(scans, "en").rows]
    for cells, site in zip(values, style.residuals(stock), strict=True):
        shown = number_text(site.largest)
        assert cells[:2] == (str(site.layer), f"infinite ({shown} in fp32)" if site.past_limit else shown)
    by_place = {(site.layer, site.site): site for site in stock.sites}
    for layer, cells in tables.heat_map(stock, "en").rows:
        for name, (text, band) in zip(style.SITES, cells, strict=True):
            bits = by_place[layer, name].headroom_bits
            assert float(text.replace("−", "-").replace("<", "-")) == pytest.approx(bits, abs=0.051)
            assert band.startswith("over") == (bits < 0)
            assert band.endswith("first") == ((layer, name) == (0, "raw_scores"))
    assert {text for _, cells in tables.heat_map(fixed, "en").rows for text, band in cells if band == "fp32"} == {
        "fp32"
    }


def test_the_first_card_says_what_to_know_and_what_to_do(scans: list[ScanResult]) -> None:
    stock, fixed = scans
    found = card.card(scans, "en")
    assert found["headline"] == [("Breaks in stock float16.", "bad"), ("Safe with the fix.", "good")]
    assert found["words"].startswith("It breaks first in layer 0, in the raw attention scores, q·k before")
    assert found["words"].endswith(f"{number_text(stock.first_nonfinite.largest)}, over the float16 limit of 65,504.")
    assert found["coordinates"].startswith("head 1, channel 15, token 19")
    assert found["code"] == "import qwen2_fp16_fix\nqwen2_fp16_fix.register()"
    assert found["heads"] == ["stock float16", "fixed float16"]
    assert [row["cells"][0].text for row in found["rows"]][::3] == [
        "✗ breaks in layer 0",
        f"{len(stock.past_limit)} of {len(stock.sites)}",
    ]
    assert [row["cells"][1].text for row in found["rows"]][::4] == ["✓ finite", "proven finite"]
    unproven = [replace(scan, certificate=replace(scan.certificate, proven=False)) for scan in scans]
    failed = replace(unproven[1], finite=False)
    for which, said in (
        (unproven, "Breaks in stock float16. Finite with the fix on these prompts."),
        ([unproven[0], failed], "Breaks in stock float16. Breaks with the fix as well."),
        ([stock], "Breaks in stock float16. Safe with the fix."),
        ([unproven[0]], "Breaks in stock float16."),
        ([fixed], "Safe with the fix."),
        ([unproven[1]], "Finite with the fix on these prompts."),
        ([replace(stock, finite=True), fixed], "Finite in stock float16 on these prompts. Safe with the fix."),
    ):
        assert " ".join(text for text, _ in card.headline(which, "en")) == said
    foreign = card.card([replace(stock, foreign_code="theirs.Model")], "en")
    assert "theirs.Model" in foreign["notes"][-1]


def test_the_tables_say_what_was_found(html: str, scans: list[ScanResult]) -> None:
    numbers = html[html.index('id="numbers-table"') :]
    numbers = numbers[: numbers.index("</table>")]
    assert numbers.count("<tr") - 1 == len(scans[0].sites)
    assert numbers.count("<tr class=bad") == len(scans[0].past_limit) > 4
    assert "18.5000" in html
    assert "NaN" in html
    assert html.count("<caption") == html.count("<table") - 1 == 10  # stock beside fixed has a heading
    assert all(getattr(scans[0].versions, name) in html for name in ("package", "transformers", "torch"))


def test_the_page_is_one_small_file_that_loads_nothing(html: str, scans: list[ScanResult]) -> None:
    """80 layers of random numbers, in the language whose letters take three bytes, are the worst case: 300 kB."""
    assert len(html.encode()) < 100e3
    assert len(page([enlarged(scan, 80) for scan in scans], None, "zh").encode()) < 300e3
    assert not re.search(r'https?://|src=|url\(|@import|xmlns|<style type|href="(?!#|data:)', html)
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|labelledby=")([\w-]+)"', html)) <= set(ids)


@pytest.mark.parametrize("kinds", [(), ("massive",)])
def test_one_scan_alone_makes_a_page(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    """Without spikes, without massive activations, without a fixed scan: what is not there is left out, or said so."""
    build(TINY, kinds).half().save_pretrained(tmp_path)
    scan = qwen2_fp16_fix.scan(tmp_path, [random_prompt(TINY, 1, 9)], fixed=bool(kinds), device="cpu")
    made = page([scan], None, "zh" if kinds else "en")
    assert 'id="chart-spikes"' not in made
    assert 'id="chart-against"' not in made
    assert 'id="verify-table"' not in made
    assert ('id="massive-table"' in made) == bool(kinds)


def test_a_model_has_a_name(scans: list[ScanResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scan .` made a page without a heading; a model in the Hub's cache was called by its commit."""
    (tmp_path / "Qwen2-7B").mkdir()
    monkeypatch.chdir(tmp_path / "Qwen2-7B")
    assert style.model_name(".") == "Qwen2-7B"
    cached = tmp_path / "models--Qwen--Qwen2.5-7B" / "snapshots" / "0123456789abcdef"
    assert style.model_name(str(cached)) == "Qwen/Qwen2.5-7B@0123456"


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


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(colour: str, ground: str) -> float:
    """The contrast of two colours, from 1 to 21 (WCAG 2.2)."""
    low, high = sorted((luminance(colour), luminance(ground)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast(theme: str) -> None:
    """At least 4.5 to 1 for text, 3 to 1 for lines and dots of charts (WCAG 2.2, 1.4.3 and 1.4.11)."""
    for name, colours in style.PALETTE.items():
        for ground in ("panel", "ground"):
            if name not in ("panel", "ground", "line"):
                least = 3 if name in ("third", "fourth") else 4.5  # stock and fixed also colour notes
                assert contrast(colours[theme], style.PALETTE[ground][theme]) >= least, (name, ground)
    for band in (*style.BANDS, style.FP32):
        assert contrast(getattr(band, f"{theme}_ink"), getattr(band, theme)) >= 4.5, band.name


def test_the_picture_is_a_small_described_png(
    scans: list[ScanResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of dollars was set as mathematics, and raised: after the run, no picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a letter that the font lacks is a warning and an empty box
        written = ScanFiles(png=tmp_path / "out.png").write([with_tokens(scan, "$^$") for scan in scans], None)
    with Image.open(written[0]) as image:
        assert image.format == "PNG"
        assert image.width == 1400
        assert image.info["Description"].startswith("✗ Stock float16 (eager) breaks first in layer")
    assert written[0].stat().st_size < 90e3
    monkeypatch.setattr(drawing, "CHINESE_FONTS", ("No Such Font",))
    with pytest.raises(ScanError, match="no font here has Chinese letters for the PNG: install"):
        ScanFiles(png=tmp_path / "zh.png", lang="zh").check(force=False)


def test_a_font_that_was_installed_since_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib keeps a list of fonts: whoever installed the font that we asked for was asked for it again."""
    here = font_manager.fontManager.ttflist
    (new, *_) = [font for font in here if font.name == "DejaVu Sans Mono"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [font for font in here if font.name != new.name])
    monkeypatch.setattr(drawing, "CHINESE_FONTS", (new.name,))
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [new.fname, __file__])
    assert drawing.fonts("zh") == [new.name, drawing.PLAIN]


def test_threads_draw_the_same_and_leave_the_settings_of_matplotlib(scans: list[ScanResult]) -> None:
    """matplotlib's settings belong to the process, and a program's own style made our lines thick."""

    def draw() -> dict[str, str]:
        return drawing.svgs(charts.charts(scans[:1], "zh")[-2], "zh", {})

    alone, found = draw(), []
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30}):
        before = dict(matplotlib.rcParams)
        threads = [threading.Thread(target=lambda: found.append(draw())) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert dict(matplotlib.rcParams) == before
    assert found == [alone, alone]
    assert "偏置" in alone["wide"]
    assert "@" not in alone["wide"]


def test_axes_have_ticks_between_their_ends() -> None:
    for values in ([65504.0, 70000.0], [1.0, 1e9], [None, 3e-4, 0.1], [5.0], [None]):
        low, high, ticks = style.log_ticks(values)
        known = [math.log10(value) for value in values if value]
        assert ticks
        assert all(low <= value <= high for value in [*known, *map(math.log10, ticks)])
    assert [style.signed(bits) for bits in (-0.02, -0.4, 0.0, 12.34)] == ["<0", "−0.4", "0.0", "12.3"]


def test_a_report_reads_what_verify_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's keys are verify's own: here of a real run, so that the two cannot part."""
    few = [rows.ORACLE, *(rows.Row("float16", "eager", fixed) for fixed in (False, True))]
    monkeypatch.setattr(verify, "planned_rows", lambda device: few)
    monkeypatch.setattr(rows, "NEW_TOKENS", 2)
    found = qwen2_fp16_fix.verify(DEMO_CHECKPOINT, window=16, stride=8, tokens=17, device="cpu")
    (tmp_path / "verify.json").write_text(json.dumps(found.to_dict()))
    assert read_saved(tmp_path / "verify.json", ScanError) == found.to_dict()
