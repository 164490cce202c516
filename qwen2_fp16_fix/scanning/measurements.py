"""What a scan keeps of the tensors it sees: extremes by site, outliers by layer, and where float16 first breaks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..activations.extremes import Extremes, ScoreExtremes, TokenPlace
from ..activations.layerwise import LayerwiseRun
from ..activations.sites import SCORES, Attended, SitePlace, Watch, execution_order
from ..patches.architecture import QWEN2
from .quantisation import CacheLoss, CacheSummary, LossSummary, MassiveActivations, RoundingLoss

#: The inputs of linears, by the linears they feed: what a quantised matmul would round.
FED = {site.name: QWEN2.fed_by(site.name) for site in QWEN2.sites}
LINEAR_INPUTS = {site: ", ".join(linear.writes for linear in linears) for site, linears in FED.items() if linears}


class Observer(Protocol):
    """Looks at a stream of prompts on its way through a model, until it is done."""

    @property
    def done(self) -> bool:
        """Whether the rest of the way says nothing more."""

    def start(self, stream: LayerwiseRun) -> None:
        """Looks at the embeddings."""

    def watching(self, number: int, layer: Any, prompt: int) -> AbstractContextManager[None]:
        """Looks at what a layer does to one prompt inside."""

    def close(self, number: int) -> None:
        """Has seen what a layer does to every prompt."""

    def end(self, stream: LayerwiseRun) -> None:
        """Looks at the final norm and the logits."""


class Survey:
    """Everything that is measured on one stream of prompts."""

    done = False

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

    @contextmanager
    def watching(self, number: int, layer: Any, prompt: int) -> Iterator[None]:
        """Measures what a layer does to one prompt inside."""
        self.prompt, self.value_heads = prompt, layer.self_attn.config.num_key_value_heads
        with Watch({number: layer}, self.see, self.attend):
            yield

    def see(self, place: SitePlace, tensor: Tensor) -> None:
        """Measures a site; scores are left to `attend`."""
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

    def attend(self, attended: Attended) -> None:
        """Measures the scores of a layer, and what rounding its keys would do to them."""
        self._scores(attended.layer).add(attended, self.prompt)
        self.keys.add(attended.key)
        self.keys.add_scores(attended)

    def close(self, number: int) -> None:
        """Boils the losses of a layer down to a few numbers.

        The vectors they come from, were they kept, would lie scattered between the activations of later layers, which
        then fit nowhere twice: the process grew by 22 MB a layer.
        """
        self.input_losses |= {SitePlace(number, site): loss.summary() for site, loss in self.inputs.items()}
        if self.values.seen:
            self.cache_losses[number] = CacheSummary(
                self.keys.summary() if self.keys.seen else None,
                self.keys.score_summary() if self.keys.seen else None,
                self.values.summary(),
            )
        self.inputs, self.keys, self.values = {}, CacheLoss(), CacheLoss()

    def _scores(self, number: int | None) -> ScoreExtremes:
        scores = self.scores.setdefault(number or 0, ScoreExtremes())
        self.sites.setdefault(SitePlace(number, SCORES["raw"]), scores.raw)
        self.sites.setdefault(SitePlace(number, SCORES["scaled"]), scores.scaled)
        return scores

    def start(self, stream: LayerwiseRun) -> None:
        """Measures the embeddings."""
        for prompt, hidden in enumerate(stream.hidden):
            self.sites.setdefault(SitePlace(None, "embedding"), Extremes()).add(hidden, prompt)

    def end(self, stream: LayerwiseRun) -> None:
        """Measures the final norm and the logits, some tokens at a time."""
        norm, logits = Extremes(), Extremes()
        for prompt in range(len(stream.hidden)):
            normed = stream.normed(prompt)
            norm.add(normed, prompt)
            for start, part in stream.logits(normed):
                logits.add(part, prompt, first_position=start)
        self.sites[SitePlace(None, "final_norm")] = norm
        if logits.numbers:
            self.sites[SitePlace(None, "logits")] = logits

    def first_break(self) -> SitePlace | None:
        """The first site, in the order of execution, with a number that is not finite."""
        broken = [place for place, extremes in self.sites.items() if not extremes.finite]
        return min(broken, key=execution_order, default=None)


class FirstBreak:
    """Looks for the first site of a stream that is not finite, over all prompts of a layer."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.found: SitePlace | None = None
        self.spot = TokenPlace(0, 0, 0)
        self.running = 0

    @property
    def done(self) -> bool:
        """What comes after a number that is not finite says nothing. Asked between layers."""
        return self.found is not None

    def start(self, stream: LayerwiseRun) -> None:
        """Looks at the embeddings."""
        for self.running, hidden in enumerate(stream.hidden):
            self.see(SitePlace(None, "embedding"), hidden)

    @contextmanager
    def watching(self, number: int, layer: Any, prompt: int) -> Iterator[None]:
        """Looks at what a layer does to one prompt inside."""
        self.running = prompt
        with Watch({number: layer}, self.see):
            yield

    def close(self, number: int) -> None:
        """Keeps what it has."""

    def see(self, place: SitePlace, tensor: Tensor) -> None:
        """Notes a site that comes before the one that is known, and the first number in it that is not finite."""
        if self.found is not None and execution_order(place) >= execution_order(self.found):
            return
        if not all(bool(part.isfinite().all()) for part in torch.split(tensor.flatten(0, -2), 4096)):
            rows = tensor.flatten(0, -2)
            row, channel = divmod(int((~rows.isfinite()).byte().argmax()), rows.shape[1])
            self.found, self.spot = place, TokenPlace(self.running, row % tensor.shape[-2], channel)

    def end(self, stream: LayerwiseRun) -> None:
        """Looks at the final norm and the logits."""
        for self.running in range(len(stream.hidden)):
            normed = stream.normed(self.running)
            self.see(SitePlace(None, "final_norm"), normed)
            for _, part in stream.logits(normed):
                self.see(SitePlace(None, "logits"), part)
