"""The measurements of a scan: extremes by site, losses by layer, and where float16 first breaks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..activations.extremes import Break, Extremes, FirstBreak, ScoreExtremes, first_break
from ..activations.layerwise import LayerwiseRun
from ..activations.sites import SCORES, Attended, SitePlace, Watch
from ..patches.architecture import QWEN2
from .quantisation import CacheLoss, CacheSummary, LossSummary, MassiveActivations, RoundingLoss

#: The sites that linears read, with the linears' names. A quantised matmul would round these inputs.
FED = {site.name: QWEN2.fed_by(site.name) for site in QWEN2.sites}
LINEAR_INPUTS = {site: ", ".join(linear.writes for linear in linears) for site, linears in FED.items() if linears}


class Measurements:
    """Everything that is measured on one run of the prompts."""

    def __init__(self) -> None:
        """Starts empty."""
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
        """Takes every prompt through a layer and measures its sites."""
        run.step(number, lambda prompt: self.watching(number, layer, prompt))
        self.close(number)

    @contextmanager
    def watching(self, number: int, layer: Any, prompt: int) -> Iterator[None]:
        """For a block that runs a layer on one prompt: measures its sites."""
        self.prompt, self.value_heads = prompt, layer.self_attn.config.num_key_value_heads
        with Watch({number: layer}, self.on_site, self.on_attention):
            yield

    def on_site(self, place: SitePlace, tensor: Tensor) -> None:
        """Measures a site. Scores are left to `on_attention`."""
        if place.site in SCORES.values():
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
        """Measures the scores of a layer, and how rounded keys would change them."""
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

    @property
    def broken(self) -> Break | None:
        """The first site with a number that is not finite."""
        return first_break(self.sites)

    def _scores(self, number: int | None) -> ScoreExtremes:
        scores = self.scores.setdefault(number or 0, ScoreExtremes())
        self.sites.setdefault(SitePlace(number, SCORES["raw"]), scores.raw)
        self.sites.setdefault(SitePlace(number, SCORES["scaled"]), scores.scaled)
        return scores


class BreakSearch:
    """Looks for the site at which a run breaks first, and measures nothing else. It costs little more than the forward.

    All prompts go through the layer in which one of them breaks, since another may break at an earlier site of it.
    """

    def __init__(self) -> None:
        """Starts with no site found."""
        self.first = FirstBreak()
        self.prompt = 0

    @property
    def broken(self) -> Break | None:
        """The first site with a number that is not finite, so far."""
        return self.first.found

    def start(self, run: LayerwiseRun) -> None:
        """Looks at the embeddings."""
        for self.prompt, hidden in enumerate(run.hidden):
            self.on_site(SitePlace(None, "embedding"), hidden)

    def step(self, run: LayerwiseRun, number: int, layer: Any) -> None:
        """Takes every prompt through a layer and looks at its sites."""
        run.step(number, lambda prompt: self.watching(number, layer, prompt))

    @contextmanager
    def watching(self, number: int, layer: Any, prompt: int) -> Iterator[None]:
        """For a block that runs a layer on one prompt: looks at its sites."""
        self.prompt = prompt
        with Watch({number: layer}, self.on_site):
            yield

    def on_site(self, place: SitePlace, tensor: Tensor) -> None:
        """Looks at a site."""
        self.first.look(place, tensor, self.prompt)

    def end(self, run: LayerwiseRun) -> None:
        """Looks at the final norm and the logits."""
        for self.prompt in range(len(run.hidden)):
            normed = run.normed(self.prompt)
            self.on_site(SitePlace(None, "final_norm"), normed)
            for _, part in run.logits(normed):
                self.on_site(SitePlace(None, "logits"), part)
