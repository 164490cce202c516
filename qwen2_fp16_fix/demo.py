"""The demonstration: one checkpoint, one prompt, stock and fixed, in fp32 and float16.

The checkpoint is part of this package, so nothing is downloaded.
"""

import gc
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.styled import Styled
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from .activations.extremes import Magnitudes, overflow_lines
from .activations.sites import place_text
from .checkpoints.loading import forward, load, quiet
from .checkpoints.threads import one_thread
from .errors import CheckpointError, ExportError
from .files.folders import whole_folder
from .files.packaged import DEMO_CHECKPOINT as CHECKPOINT
from .files.reading import to_path
from .model_status import status
from .patches.range_plan import FLOAT16_MAX
from .progress import Progress, with_bar
from .results import Record, Result
from .status_result import Status
from .translations import DEMO_TEXTS as TEXTS
from .translations import check_language

PROMPT = "And the LORD said unto Moses,"
NEW_TOKENS = 48
WINDOW = 256  # tokens scored together for the perplexity

ROWS = (
    ("stock float32", False, torch.float32, "eager"),
    ("stock float16 eager", False, torch.float16, "eager"),
    ("stock float16 sdpa", False, torch.float16, "sdpa"),
    ("fixed float16 eager", True, torch.float16, "eager"),
    ("fixed float16 sdpa", True, torch.float16, "sdpa"),
)


@dataclass(frozen=True)
class DemoRow(Record):
    """One way of running the demo checkpoint, and its outcome."""

    name: str
    text: str  # the continuation of the prompt
    perplexity: float | None  # of the held-out passage; None if it is not finite
    finite: bool  # all logits of the prompt
    first_overflow: str | None  # the first site that is not finite


@dataclass(frozen=True)
class Peak(Record):
    """A site with large numbers."""

    site: str
    magnitude: float  # the largest, in fp32


@dataclass(frozen=True, repr=False)
class Demonstration(Result):
    """The result of `measure`."""

    versions: Status
    prompt: str
    rows: list[DemoRow]
    peaks: list[Peak]  # the largest first
    as_promised: bool  # stock float16 broke in both backends, and every fixed text equals the fp32 text
    language: str = "en"  # of the table

    def summary(self) -> str:
        """Whether the demonstration went as promised, in a sentence."""
        return TEXTS[self.language]["as_promised" if self.as_promised else "not_as_promised"]

    def __rich__(self) -> RenderableType:
        """The texts, the perplexities, and the first site of each row that is not finite."""
        versions, texts = self.versions, TEXTS[self.language]
        patch = f"transformers {versions.transformers} (patch {versions.patch})"
        parts: list[RenderableType] = [Text(f"qwen2-fp16-fix {versions.package}, {patch}, torch {versions.torch}\n")]
        for row in self.rows:
            colour = "green" if row.text == self.rows[0].text else "red"
            perplexity = texts["not_a_number"] if row.perplexity is None else format(row.perplexity, ".5f")
            title = texts["title"].format(name=self._name(row), perplexity=perplexity)
            parts.append(Panel(self.prompt + row.text, title=title, title_align="left", border_style=colour))
        limit = texts["column_limit"].format(limit=f"{FLOAT16_MAX:,.0f}")
        table = Table(texts["column_site"], texts["column_magnitude"], limit, title_justify="left")
        for peak in self.peaks:
            over = texts["over"] if peak.magnitude > FLOAT16_MAX else ""
            table.add_row(place_text(peak.site, self.language), f"{peak.magnitude:,.0f}", over)
        broken = overflow_lines([(self._name(row), row.first_overflow) for row in self.rows], texts, self.language)
        return Group(*parts, table, *map(Text, broken), Styled(Text(f"\n{self.summary()}"), "bold"))

    def _name(self, row: DemoRow) -> str:
        kind, _, how = row.name.partition(" ")
        return TEXTS[self.language][kind].format(how=how)


@one_thread()
def measure(folder: Path = CHECKPOINT, *, language: str = "en", progress: Progress = None) -> Demonstration:
    """Runs the prompt through every row.

    language: of the table, "en" or "zh". progress: True for a bar on stderr, or a rich Console to show it on. Returns a
    Demonstration: `as_promised`, and in `rows` the text and the perplexity of each.
    Raises CheckpointError if `folder` holds no demo checkpoint, or there is no such language.
    """
    check_language(language, CheckpointError)
    tokenizer, passage = _load_text(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    rows: list[DemoRow] = []
    peaks: list[Peak] = []
    for name, fixed, dtype, attention in with_bar(ROWS, "running the demo checkpoint", progress):
        model = load(folder, fixed, dtype, attention)
        with Magnitudes(model) as magnitudes:
            logits = forward(model, prompt)
        if name == "stock float32":
            peaks = [Peak(**peak) for peak in magnitudes.largest(4)]
        perplexity = perplexity_of(model, passage)
        row = DemoRow(
            name=name,
            text=generate(model, tokenizer, prompt),
            perplexity=perplexity if math.isfinite(perplexity) else None,
            finite=bool(torch.isfinite(logits).all()),
            first_overflow=magnitudes.first_overflow(),
        )
        rows.append(row)
        del model
        gc.collect()
    return Demonstration(status(), PROMPT, rows, peaks, as_promised=_as_promised(rows), language=language)


def save(folder: Path) -> None:
    """Copies the checkpoint to a new folder, for commands that take one. Raises ExportError if that fails."""
    with whole_folder(to_path(folder, ExportError).absolute(), ExportError) as written:
        for file in CHECKPOINT.iterdir():  # shutil.copytree does not say why it failed
            shutil.copyfile(file, written / file.name)


def _as_promised(rows: list[DemoRow]) -> bool:
    """Whether stock float16 broke in both backends, and each fixed row gives the text of fp32."""
    oracle, stock, fixed = rows[0], rows[1:3], rows[3:]
    broke = all(not row.finite and set(row.text) == {"!"} for row in stock)
    agrees = all(row.finite and row.text == oracle.text for row in fixed)
    return oracle.finite and broke and agrees


@torch.no_grad()
def perplexity_of(model: nn.Module, tokens: Tensor) -> float:
    """exp of the mean negative log likelihood of tokens (1, S), in windows that do not overlap. NaN stays NaN."""
    total, count = 0.0, 0
    for window in torch.split(tokens, WINDOW, dim=1):
        if window.shape[1] > 1:
            logits = forward(model, window)[0, :-1].double()
            total += float(nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
            count += window.shape[1] - 1
    return math.exp(total / count) if math.isfinite(total) else math.nan


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompt: Tensor) -> str:
    """The greedy continuation of the prompt."""
    with quiet():
        tokens = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    return str(tokenizer.decode(tokens[0, prompt.shape[1] :]))


def _load_text(folder: Path) -> tuple[Any, Tensor]:
    """The tokenizer, and the held-out passage as tokens (1, S)."""
    if not (folder / "config.json").is_file() or not (folder / "held_out.txt").is_file():
        raise CheckpointError(f"found no demo checkpoint in {folder}: reinstall qwen2-fp16-fix.")
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        text = (folder / "held_out.txt").read_text(encoding="utf-8")
        return tokenizer, tokenizer(text, return_tensors="pt")["input_ids"]
