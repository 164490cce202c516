"""What a scan keeps of the tensors it sees: extremes by site, losses by layer, and where float16 first breaks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations.extremes import Extremes, ScoreExtremes
from ..activations.extremes import Spot as TokenPlace
from ..activations.layerwise import Stream as LayerwiseRun
from ..activations.sites import ENDS, SITES, Attended, Watch
from ..activations.sites import Place as SitePlace
from .quantisation import CacheLoss, CacheSummary, LossSummary, MassiveActivations, RoundingLoss

#: The inputs of linears, by the linears they feed: what a quantised matmul would round.
LINEAR_INPUTS = {"input_norm": "q, k, v", "attention": "o_proj", "post_norm": "gate, up", "product": "down_proj"}
ROWS = 4096  # looked at together for a number that is not finite


class Break(NamedTuple):
    """The first site with a number that is not finite, and where the first such number was."""

    place: SitePlace
    spot: TokenPlace | None


def first_break(nonfinite: Mapping[SitePlace, TokenPlace | None]) -> Break | None:
    """The first, in the order of execution, of sites that are not finite. A later prompt may break an earlier site."""
    place = min(nonfinite, key=execution_order, default=None)
    return None if place is None else Break(place, nonfinite[place])


def execution_order(place: SitePlace) -> tuple[int, int]:
    """Sorts places as they are computed."""
    if place.layer is None:
        return (-1, 0) if place.site == "embedding" else (10**9, list(ENDS).index(place.site))
    return place.layer, list(SITES).index(place.site)


class Measurements:
    """Everything that is measured on one run of the prompts."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.sites: dict[SitePlace, Extremes] = {}
        self.scores: dict[int, ScoreExtremes] = {}
        self.inputs: dict[str, RoundingLoss] = {}  # of the layer that is running, as are keys and values
        self.keys, self.values = CacheLoss(), CacheLoss()
        self.input_losses: dict[SitePlace, LossSummary] = {}
        self.cache_losses: dict[int, CacheSummary] = {}
        self.massive = MassiveActivations()
        self.prompt = 0
        self.value_heads = 1

    def start(self, run: LayerwiseRun) -> None:
        """Measures the embeddings."""
        for prompt, hidden in enumerate(run.hidden):
            self.sites.setdefault(SitePlace(None, "embedding"), Extremes()).add(hidden, prompt)

    def step(self, run: LayerwiseRun, number: int, layer: Any) -> None:
        """Takes every prompt through a layer and measures what it does."""
        run.step(number, lambda prompt: self.watching(number, layer, prompt))
        self.close(number)

    @contextmanager
    def watching(self, number: int, layer: Any, prompt: int) -> Iterator[None]:
        """Measures what a layer does to one prompt."""
        self.prompt, self.value_heads = prompt, layer.self_attn.config.num_key_value_heads
        with Watch({number: layer}, self.on_site, self.on_attention):
            yield

    def on_site(self, place: SitePlace, tensor: Tensor) -> None:
        """Measures a site. Scores are left to `on_attention`."""
        if place.site in ("raw_scores", "scaled_scores"):
            self._scores(place.layer).scaled.dtype = tensor.dtype
            return
        self.sites.setdefault(place, Extremes()).add(tensor, self.prompt)
        if place.site in LINEAR_INPUTS:
            self.inputs.setdefault(place.site, RoundingLoss(127)).add(tensor)
        elif place.site == "v":
            heads = tensor.reshape(*tensor.shape[:2], self.value_heads, -1).transpose(1, 2)
            self.values.add(heads)
        elif place.site == "residual":
            self.massive.add(place.layer or 0, self.prompt, tensor)

    def on_attention(self, attended: Attended) -> None:
        """Measures the scores of a layer, and what rounding its keys would do to them."""
        self._scores(attended.layer).add(attended, self.prompt)
        self.keys.add(attended.key)
        self.keys.add_scores(attended)

    def close(self, number: int) -> None:
        """Reduces the losses of a layer to a few numbers.

        Keeping a vector per channel fragmented the heap: memory grew by 22 MB a layer.
        """
        self.input_losses |= {SitePlace(number, site): loss.summary() for site, loss in self.inputs.items()}
        if self.values.seen:
            self.cache_losses[number] = CacheSummary(
                self.keys.summary() if self.keys.seen else None,
                self.keys.score_summary() if self.keys.seen else None,
                self.values.summary(),
            )
        self.inputs, self.keys, self.values = {}, CacheLoss(), CacheLoss()

    def end(self, run: LayerwiseRun) -> None:
        """Measures the final norm and the logits, some tokens at a time."""
        norm, logits = Extremes(), Extremes()
        for prompt in range(len(run.hidden)):
            normed = run.normed(prompt)
            norm.add(normed, prompt)
            for start, part in run.logits(normed):
                logits.add(part, prompt, first_position=start)
        self.sites[SitePlace(None, "final_norm")] = norm
        if logits.numbers:
            self.sites[SitePlace(None, "logits")] = logits

    def nonfinite(self) -> dict[SitePlace, TokenPlace | None]:
        """The sites with a number that is not finite, and where the first such number was."""
        return {place: extremes.spot for place, extremes in self.sites.items() if not extremes.finite}

    def _scores(self, number: int | None) -> ScoreExtremes:
        scores = self.scores.setdefault(number or 0, ScoreExtremes())
        self.sites.setdefault(SitePlace(number, "raw_scores"), scores.raw)
        self.sites.setdefault(SitePlace(number, "scaled_scores"), scores.scaled)
        return scores


class NonfiniteSites:
    """The sites of a run that are not finite. Measures nothing else, so that the run costs little more than a forward.

    A run of several prompts goes to the end of the layer in which a number is not finite first.
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.found: dict[SitePlace, TokenPlace | None] = {}
        self.prompt = 0

    def start(self, run: LayerwiseRun) -> None:
        """Looks at the embeddings."""
        for self.prompt, hidden in enumerate(run.hidden):
            self.on_site(SitePlace(None, "embedding"), hidden)

    def step(self, run: LayerwiseRun, number: int, layer: Any) -> None:
        """Takes every prompt through a layer and looks at its sites."""
        run.step(number, lambda prompt: self.watching(number, layer, prompt))

    @contextmanager
    def watching(self, number: int, layer: Any, prompt: int) -> Iterator[None]:
        """Looks at what a layer does to one prompt."""
        self.prompt = prompt
        with Watch({number: layer}, self.on_site):
            yield

    def on_site(self, place: SitePlace, tensor: Tensor) -> None:
        """Notes a site that comes before those known, and the first number in it that is not finite."""
        known = first_break(self.found)
        if known is not None and execution_order(place) >= execution_order(known.place):
            return
        if not all(bool(part.isfinite().all()) for part in torch.split(tensor.flatten(0, -2), ROWS)):
            rows = tensor.flatten(0, -2)
            row, channel = divmod(int((~rows.isfinite()).byte().argmax()), rows.shape[1])
            self.found[place] = TokenPlace(self.prompt, row % tensor.shape[-2], channel)

    def end(self, run: LayerwiseRun) -> None:
        """Looks at the final norm and the logits."""
        for self.prompt in range(len(run.hidden)):
            normed = run.normed(self.prompt)
            self.on_site(SitePlace(None, "final_norm"), normed)
            for _, part in run.logits(normed):
                self.on_site(SitePlace(None, "logits"), part)
