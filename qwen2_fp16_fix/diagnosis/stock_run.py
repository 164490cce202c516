"""A short run of the stock model: a few prompts through its first and last layers, to see what float16 cannot hold.

It computes in fp32 with the weights as float16 has them, so a number over the limit still has a size. The first layers
see their real input. The last layers see the output of the first ones, because the layers between are not run: what
they show is an estimate. So are the scores of the layers between, taken from the biases of queries and keys alone.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..activations.extremes import Extremes, ScoreExtremes
from ..activations.layerwise import LayerwiseRun
from ..activations.sites import SCORES, Attended, SitePlace, Watch, execution_order
from ..activations.weights_on_demand import ModelOnDisk
from ..checkpoints.folder import FolderSource, open_checkpoint
from ..checkpoints.stored import opened
from ..checkpoints.threads import own_cores
from ..checkpoints.tokenizer import open_tokenizer
from ..errors import CheckpointError
from ..patches.range_plan import FLOAT16_MAX
from ..progress import Progress, with_bar
from ..scanning.prompts import DEFAULT_PROMPTS, token_ids

#: Weights in the layers that are run: all layers of a 1.5B, six of a 7B. A run takes some seconds.
WEIGHTS = 1.5e9
LAST = 2  # layers at the end, if not all are run
TOKENS = 64  # of a prompt
PROMPTS = (DEFAULT_PROMPTS[0], DEFAULT_PROMPTS[-1])
RANDOM_IDS = 32  # for each prompt, if there is no tokenizer
RAW = SCORES["raw"]  # stored by eager attention only


class Reached(NamedTuple):
    """The largest number of a site, and whether it was seen, or estimated."""

    layer: int
    site: str
    largest: float  # infinite or NaN if a weight is, in float16
    seen: bool

    @property
    def over(self) -> bool:
        """Whether float16 cannot hold it."""
        return not self.largest <= FLOAT16_MAX


@dataclass
class StockRun:
    """What a short run of a stock model has shown."""

    layers: int  # of the checkpoint
    first: list[int]  # the layers that saw their real input
    last: list[int]  # those that saw the output of `first`
    tokens: int
    worded: bool  # False if there was no tokenizer, and the tokens were random ones
    reached: list[Reached] = field(default_factory=list)  # in the order of execution

    @property
    def complete(self) -> bool:
        """Whether every layer was run on its real input."""
        return len(self.first) == self.layers

    def over(self, seen: bool, scores: bool | None = None) -> list[Reached]:
        """What float16 cannot hold. scores: only raw scores, or all but them; None for both."""
        found = [each for each in self.reached if each.over and each.seen is seen]
        return [each for each in found if scores is None or (each.site == RAW) is scores]

    @property
    def largest(self) -> Reached:
        """The largest number that was seen."""
        return max((each for each in self.reached if each.seen), key=lambda each: each.largest)


@own_cores()
def run_stock(path: Path, progress: Progress = None) -> StockRun:
    """Runs the short run. Raises CheckpointError if the checkpoint cannot be run."""
    source = open_checkpoint(path)
    prompts, worded = prompts_of(path, source)
    weights = FewTokens(path, source, prompts)
    first, last = layers_to_run(source)
    found = StockRun(source.layers, first, last, sum(ids.shape[1] for ids in prompts), worded)
    run = LayerwiseRun(weights, weights.ids, full_precision=True)
    for number in with_bar([*first, *last], "running layers", progress):
        watched = LayerExtremes(number)
        with weights.layer(number):
            run.step(number, lambda prompt: watched.watching(weights.base.layers[number], prompt))  # noqa: B023, at once
        found.reached += watched.reached(number in first)
    for number in range(first[-1] + 1, source.layers - len(last)):
        found.reached.append(Reached(number, RAW, scores_of_biases(source, number), seen=False))
    found.reached.sort(key=lambda each: execution_order(SitePlace(each.layer, each.site)))
    return found


def layers_to_run(source: FolderSource, weights: float = WEIGHTS) -> tuple[list[int], list[int]]:
    """The first and the last layers with at most so many weights, at least one of each. All are first if all fit."""
    names = [f"{source.prefix}layers.0.{name}" for name in source.layer_names(0)]
    a_layer = sum(torch.Size(source.stored[name].shape).numel() for name in names)
    count = max(2, int(weights // a_layer))
    if count >= source.layers:
        return list(range(source.layers)), []
    last = min(LAST, count // 2)
    return list(range(count - last)), list(range(source.layers - last, source.layers))


def prompts_of(path: Path, source: FolderSource) -> tuple[list[Tensor], bool]:
    """Token ids (1, S) of each prompt, and whether they are of words: random ones stand in for a missing tokenizer."""
    rows = source.stored[f"{source.prefix}embed_tokens.weight"].shape[0]
    limit = min(TOKENS, source.shape.positions)
    try:
        tokenizer = open_tokenizer(path)
        return [token_ids(prompt, tokenizer, limit, rows) for prompt in PROMPTS], True
    except CheckpointError:  # there is none, or another model's
        chance = torch.Generator().manual_seed(0)
        size = (1, min(RANDOM_IDS, limit))
        return [torch.randint(rows, size, generator=chance) for _ in PROMPTS], False


class FewTokens(ModelOnDisk):
    """A stock checkpoint that embeds the tokens of some prompts only, and reads only their rows of the embedding."""

    def __init__(self, path: Path, source: FolderSource, prompts: list[Tensor]) -> None:
        """prompts: token ids (1, S). `ids` has them as rows of the embedding that is read."""
        super().__init__(path, source, fixed=False, attention="eager", device=torch.device("cpu"))
        tokens: Tensor = torch.unique(torch.cat(prompts, dim=1))
        self.ids = [torch.searchsorted(tokens, ids) for ids in prompts]
        name = f"{source.prefix}embed_tokens.weight"
        with opened(source.stored[name].file) as tensors:
            stored = tensors.get_slice(name)
            rows = torch.cat([stored[token : token + 1] for token in tokens.tolist()])
        self.base.embed_tokens = nn.Embedding(rows.shape[0], rows.shape[1], _weight=rows.half())


class LayerExtremes:
    """The largest number of each site of a layer, over the prompts."""

    def __init__(self, number: int) -> None:
        """Starts with none."""
        self.number, self.prompt = number, 0
        self.sites: dict[SitePlace, Extremes] = {}
        self.scores = ScoreExtremes()

    def watching(self, layer: nn.Module, prompt: int) -> Watch:
        """For a block that runs the layer on a prompt."""
        self.prompt = prompt
        return Watch({self.number: layer}, self._on_site, self._on_attention)

    def reached(self, seen: bool) -> list[Reached]:
        """What each site has reached."""
        found = [Reached(self.number, place.site, extremes.largest, seen) for place, extremes in self.sites.items()]
        return [*found, Reached(self.number, RAW, self.scores.raw.largest, seen)]

    def _on_site(self, place: SitePlace, tensor: Tensor) -> None:
        if place.site not in SCORES.values():  # which `_on_attention` multiplies out
            self.sites.setdefault(place, Extremes()).add(tensor, self.prompt)

    def _on_attention(self, attended: Attended) -> None:
        self.scores.add(attended, self.prompt)


def scores_of_biases(source: FolderSource, number: int) -> float:
    """The largest raw score |q·k| of a layer between a token and itself if q and k were their biases."""
    shape: Any = source.shape
    biases = [source.read(f"{source.prefix}layers.{number}.self_attn.{name}_proj.bias").half().float() for name in "qk"]
    queries = biases[0].view(shape.kv_heads, -1, shape.head_dim)
    scores = queries @ biases[1].view(shape.kv_heads, shape.head_dim, 1)
    return float(scores.abs().max()) * float(shape.rotation_scale) ** 2
