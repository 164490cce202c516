"""What a decoder layer costs with rotary pairs in two parts, beside the same fixed layer without: counted and timed."""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from qwen2_fp16_fix.patches.two_part_keys import Split

from . import workloads
from .cost import Cost
from .layer_cost import cost_of_layer
from .models import Workshop
from .pairs import Ratio, compare
from .report import markdown_table

PAIRS = (2, 4)
CASES = (("prefill", 512, 1), ("decode", 1024, 1))


@dataclass(frozen=True)
class Row:
    """One case with `pairs` pairs a head, and without any."""

    attention: str
    case: tuple[str, int, int]
    pairs: int
    without: Cost
    with_pairs: Cost
    ratio: Ratio  # of the whole small model, with / without


def split(model: Any, pairs: int) -> Any:
    """A copy that shares the weights, whose layers store the first `pairs` pairs of each head in two parts."""
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    twin(input_ids=torch.zeros(1, 1, dtype=torch.long))  # makes its plans
    for layer in twin.model.layers:
        attention = layer.self_attn
        heads, half = attention.centre.shift.shape[1], attention.head_dim // 2
        channels = torch.cat((torch.arange(pairs), torch.arange(half, half + pairs)))
        chosen = Split(channels.expand(1, heads, 1, -1).contiguous(), 4 * pairs, 0) if pairs else None
        attention.__dict__["centre"] = attention.centre._replace(split=chosen)
    return twin


@torch.no_grad()
def measure(width: str, layers: int, budget: float) -> list[Row]:
    """Every case, in float16 on a CPU. budget: seconds of pairs for each."""
    device = torch.device("cpu")
    workshop, rows = Workshop(device), []
    for attention in ("eager", "sdpa"):
        fixed = workshop.model("fixed fp16", width, layers, attention)
        plain = split(fixed, 0)
        for pairs in PAIRS:
            wide = split(fixed, pairs)
            for case in CASES:
                ask = workloads.prefill if case[0] == "prefill" else workloads.decode
                steps = (ask(model, case[1], case[2]) for model in (plain, wide))
                ratio = compare(*steps, device, budget)
                costs = (cost_of_layer(model, *case)[0] for model in (plain, wide))
                rows.append(Row(attention, case, pairs, *costs, ratio))
    return rows


def markdown(rows: list[Row], width: str) -> str:
    """A table of the rows."""
    heads = ("attention", "case", "pairs", "launches", "MB moved", "time, with / without", "quartiles")
    return f"A layer at {width} width in float16, without → with pairs in two parts:\n\n" + markdown_table(
        heads,
        [
            [
                row.attention,
                f"{row.case[0]} {row.case[1]:,}",
                str(row.pairs),
                f"{row.without.kernels} → {row.with_pairs.kernels}",
                f"{row.without.moved / 1e6:,.1f} → {row.with_pairs.moved / 1e6:,.1f}",
                f"{row.ratio.median:.3f}",
                f"{row.ratio.lower:.3f} to {row.ratio.upper:.3f}",
            ]
            for row in rows
        ],
    )
