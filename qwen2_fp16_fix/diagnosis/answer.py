"""The doctor's answer about a checkpoint: whether it breaks in stock float16, and where."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..certification.result import Certificate
from ..certification.text import ranges
from ..progress import Progress
from ..results import Record
from ..scanning.sentences import site_name
from ..translations import number_text
from .remarks import Remark, in_words, remark

if TYPE_CHECKING:
    from .stock_run import Reached, StockRun

NAMED = 3  # further places over the limit
#: Whether it breaks, in a word.
BREAKS = ("yes", "with eager attention", "probably", "probably with eager attention", "not seen", "no")


@dataclass(frozen=True)
class PlaceReached(Record):
    """The largest number of a site in a layer. largest: None if it is not finite."""

    layer: int
    site: str
    largest: float | None
    seen: bool  # False for an estimate


@dataclass(frozen=True)
class StockAnswer(Record):
    """Whether a checkpoint breaks in stock float16, by a short run of some of its layers."""

    breaks: str  # one of BREAKS
    over: list[PlaceReached]  # what float16 cannot hold
    largest: PlaceReached  # of all that was seen
    layers: list[int]  # those that were run
    tokens: int
    text: list[str]  # sentences; the first is the answer

    @property
    def weights_fit(self) -> bool:
        """Whether float16 can hold the weights that were run. Without, a number has no finite size."""
        return all(place.largest is not None for place in self.over)


def answer_for(path: Path, certificate: Certificate | None, language: str, progress: Progress) -> StockAnswer:
    """Runs a few prompts through some layers of a checkpoint, and says what came of it.

    certificate: of the whole checkpoint, if there is one. Raises CheckpointError if the checkpoint cannot be run.
    """
    from .stock_run import run_stock  # raises for an unsupported transformers

    run = run_stock(path, progress)
    breaks, first = judge(run, certificate)
    over = [*run.over(seen=True), *run.over(seen=False)]
    remarks = [_answer(breaks, first, language), *_further(over, first, language), _how(run)]
    return StockAnswer(
        breaks=breaks,
        over=[_place(each) for each in over],
        largest=_place(run.largest),
        layers=[*run.first, *run.last],
        tokens=run.tokens,
        text=[in_words(each, language) for each in remarks],
    )


def judge(run: "StockRun", certificate: Certificate | None) -> "tuple[str, Reached]":
    """Whether it breaks, and the place to name. What was seen goes before what was estimated."""
    for seen, word in ((True, "yes"), (False, "probably")):
        if elsewhere := run.over(seen, scores=False):
            return word, elsewhere[0]
        if scores := run.over(seen, scores=True):
            return ("with eager attention" if seen else "probably with eager attention"), scores[0]
    proven = certificate is not None and certificate.proven and all(each.stock_proven for each in certificate.layers)
    return "no" if proven else "not seen", run.largest


def _answer(breaks: str, place: "Reached", language: str) -> Remark:
    site, largest = site_name(place.site, language), number_text(place.largest, language)
    code = code_of(breaks) if math.isfinite(place.largest) else "not_finite"
    return remark(f"stock.{code}", site=site, layer=place.layer, largest=largest)


def code_of(breaks: str) -> str:
    """The code of the sentence for one of BREAKS."""
    return breaks.replace(" ", "_")


def _further(over: "list[Reached]", first: "Reached", language: str) -> Iterator[Remark]:
    """Other places over the limit, each site with its layers."""
    for seen, code in ((True, "stock.further"), (False, "stock.further_estimated")):
        layers: dict[str, list[int]] = {}
        for each in over:
            if each.seen is seen and each != first:
                layers.setdefault(each.site, []).append(each.layer)
        places = [
            remark("stock.place", site=site_name(site, language), layers=ranges(numbers))
            for site, numbers in list(layers.items())[:NAMED]
        ]
        if places:
            join = in_words(remark("stock.comma"), language)
            yield remark(code, places=join.join(in_words(place, language) for place in places))


def _how(run: "StockRun") -> Remark:
    """What was run."""
    values = {"tokens": run.tokens, "layers": run.layers, "first": ranges(run.first), "last": ranges(run.last)}
    kind = "all" if run.complete else "some"
    return remark(f"stock.ran_{kind}" if run.worded else f"stock.ran_{kind}_random", **values)


def _place(found: "Reached") -> PlaceReached:
    largest = found.largest if math.isfinite(found.largest) else None
    return PlaceReached(found.layer, found.site, largest, found.seen)
