"""The first site that is not finite is found in one way, whether tensors are looked at or extremes are kept."""

import math

import pytest
import torch

from qwen2_fp16_fix.activations.extremes import Break, Extremes, FirstBreak, Magnitudes, TokenPlace, first_break
from qwen2_fp16_fix.activations.sites import SitePlace
from tests.stress import TINY, build, random_prompt

EARLY, LATE, END = SitePlace(0, "up"), SitePlace(1, "q"), SitePlace(None, "logits")


def tensor(*broken: tuple[int, int], number: float = math.inf) -> torch.Tensor:
    """(1, 5, 7), finite but for the places of `broken`."""
    made = torch.ones(1, 5, 7)
    for row, channel in broken:
        made[0, row, channel] = number
    return made


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_the_first_number_of_the_first_site(number: float) -> None:
    first = FirstBreak()
    for prompt, (place, made) in enumerate(
        [(END, tensor((0, 0), number=number)), (LATE, tensor((4, 6), (2, 3), number=number)), (EARLY, tensor())]
    ):
        first.look(place, made, prompt)
    assert first.found == Break(LATE, TokenPlace(1, 2, 3))


def test_a_later_prompt_may_break_an_earlier_site() -> None:
    first = FirstBreak()
    for prompt, place in enumerate((LATE, EARLY, END)):
        first.look(place, tensor((1, 1)), prompt)
    assert first.found == Break(EARLY, TokenPlace(1, 1, 1))


def test_the_first_prompt_of_a_site_counts() -> None:
    first = FirstBreak()
    first.look(EARLY, tensor((3, 3)), 0)
    first.look(EARLY, tensor((1, 1)), 1)
    assert first.found == Break(EARLY, TokenPlace(0, 3, 3))


def test_scores_are_placed_by_their_query() -> None:
    scores = torch.zeros(1, 4, 5, 7)
    scores[0, 2, 3, 6] = math.nan
    first = FirstBreak()
    first.look(EARLY, scores)
    assert first.found == Break(EARLY, TokenPlace(0, 3, 6))


def test_extremes_and_looks_find_the_same_first_break() -> None:
    looked, kept = FirstBreak(), {place: Extremes() for place in (END, LATE, EARLY)}
    for place, made in ((END, tensor((0, 0))), (LATE, tensor((2, 3))), (EARLY, tensor())):
        looked.look(place, made)
        kept[place].add(made, 0)
    assert first_break(kept) == looked.found == Break(LATE, TokenPlace(0, 2, 3))
    assert first_break({EARLY: kept[EARLY]}) is None


def test_magnitudes_name_the_first_overflow() -> None:
    """The demo and verify print this name."""
    model, prompt = build(TINY, ("swiglu",)).half(), random_prompt(TINY, batch=1, length=12)
    with torch.no_grad(), Magnitudes(model) as found:
        model(input_ids=prompt, use_cache=False)
    broken = [site for site, magnitude in found.found.items() if not math.isfinite(magnitude)]
    assert found.first_overflow() == broken[0]
