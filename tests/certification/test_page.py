"""What a terminal prints of a certificate: the verdict first, on one screen, with numbers that belong together."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from qwen2_fp16_fix.certification.assumptions import Assumptions
from qwen2_fp16_fix.certification.result import Certificate, LayerCertificate
from qwen2_fp16_fix.certification.text import ranges, verdict_of
from qwen2_fp16_fix.patches.range_plan import LIMITS
from qwen2_fp16_fix.translations import CERTIFY_TEXTS, number_text

SHAPES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def certificate(
    language: str = "en", layers: int = 24, exponent: int = 0, reasons: tuple[str, ...] = ()
) -> Certificate:
    """An ordinary checkpoint in bfloat16: each of its layers has weights that float16 rounds to zero."""
    found = []
    for number in range(layers):
        bits = {site: 12.0 - 0.1 * number for site in LIMITS} | {"product": 2.0 - 0.05 * number}
        stock = bits | {"residual": 1.0 - 0.1 * number, "scores": -3.0}
        exponents = {"input_norm": 0, "mlp": exponent}
        bounds = dict.fromkeys(LIMITS, 2.5e9)
        found.append(LayerCertificate(number, exponents, bounds, bits, not reasons, stock, False, []))
    cast = {"overflow": 0, "nonfinite": 0, "flushed": 12_345, "subnormal": 67_890, "total": 802_816}
    return Certificate(
        proven=not reasons,
        verdict=verdict_of(list(reasons), Assumptions(32_768, ()), found, language),
        reasons=list(reasons),
        assumes=Assumptions(32_768, ()).sentences(),
        layers=found,
        logits=62.6,
        casting={f"model.layers.{n}.{name}.weight": cast for n in range(layers) for name in SHAPES},
        scaled_layers=layers if exponent else 0,
        max_exponent=exponent,
        config={},
        seconds=1.0,
        language=language,
    )


def printed(found: Certificate, width: int, details: bool = False) -> str:
    page = io.StringIO()
    Console(file=page, width=width).print(found.details() if details else found)
    return page.getvalue()


@pytest.mark.parametrize("language", CERTIFY_TEXTS)
@pytest.mark.parametrize("width", [60, 80, 120])
def test_an_ordinary_certificate_fits_a_screen(language: str, width: int) -> None:
    """It had 376 lines for 24 layers, the verdict in the last, and `(down_pr…` in most of them."""
    many = tuple(f"layer {number}: product has no finite bound" for number in range(24))
    for found in (certificate(language), certificate(language, exponent=5), certificate(language, reasons=many)):
        page = printed(found, width)
        start = re.sub(r"\s", "", found.verdict)[:30]
        assert re.sub(r"\s", "", page).startswith(start)
        assert len(page.splitlines()) <= 24 or width < 80
        for shown in (page, printed(found, width, details=True)):
            assert not re.search(r"\w…", shown)  # nothing is cut off
            assert "product" in shown
        assert shown.count("-3.0") == 24 + 1  # the last column of the layers


def test_the_details_have_every_layer_and_tensor() -> None:
    page = printed(certificate(exponent=5), 80, details=True)
    assert all(re.search(rf"^ *{number} +product", page, re.M) for number in range(24))
    assert len(re.findall(r"^model\.layers\.\d+\.\S+ +12,345 +67,890 +802,816$", page, re.M)) == 24 * len(SHAPES)
    assert "mlp 5" in page
    assert "Scaled by a power of two, at most 2^5: layers 0-23." in page


def test_a_bound_stands_beside_its_own_limit() -> None:
    """The bound of the unscaled number, 2.5e+09, stood beside a headroom of what its exponents leave."""
    page = printed(certificate(exponent=5), 80)
    assert "2.5e+09" not in page
    rows = re.findall(r"^(?:fixed|stock) +\w+ +\d+ +([\d,]+) +([\d,]+) +(-?[\d.]+)$", page, re.M)
    assert len(rows) == 2
    for bound, limit, bits in rows:
        least, most = (int(limit.replace(",", "")) * 2.0 ** -(float(bits) + slack) for slack in (0.05, -0.05))
        assert least - 1 <= int(bound.replace(",", "")) <= most + 1  # bits have one digit, bounds are whole


def test_what_has_no_bound_is_said_so() -> None:
    found = certificate(reasons=("layer 0: product has no finite bound",), layers=2)
    unbounded = replace(found.layers[1], bounds={}, headroom_bits={}, stock_headroom_bits={})
    infinite = replace(found.layers[0], headroom_bits=found.layers[0].headroom_bits | {"product": None})
    page = printed(replace(found, layers=[infinite, unbounded], logits=None, casting={}), 80)
    assert re.search(r"^fixed +product +0 +not finite +65,504 +none$", page, re.M)
    nothing = printed(replace(found, layers=[unbounded], logits=None), 80)
    assert nothing.startswith("Not provable: ")


def test_a_number_is_written_in_one_way() -> None:
    numbers = {65504.0: "65,504", 999_999.0: "999,999", 1.2e9: "1.2e+09", 62.648: "62.6", 0.00123: "0.00123"}
    assert {value: number_text(value) for value in numbers} == numbers
    assert number_text(361_568_128) == "361,568,128"  # a count is whole
    assert number_text(None) == number_text(float("nan")) == "not finite"
    assert ranges([0, 1, 2, 5, 8, 9]) == "0-2, 5, 8-9"


def test_both_languages_say_the_same() -> None:
    english, chinese = CERTIFY_TEXTS["en"], CERTIFY_TEXTS["zh"]
    assert list(english) == list(chinese)
    for key, text in english.items():
        assert sorted(re.findall(r"{\w+}", text)) == sorted(re.findall(r"{\w+}", chinese[key])), key
