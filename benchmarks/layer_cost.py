"""What one decoder layer costs, stock and fixed: the counts of three layers less the counts of two."""

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from . import workloads
from .cost import Cost, cost_of
from .models import Workshop, first_layers
from .report import markdown_table, plain

#: (phase, tokens or context, batch) of the table. By them one sees how the cost grows.
SIZES = (
    ("prefill", 128, 1),
    ("prefill", 512, 1),
    ("prefill", 2048, 1),
    ("decode", 64, 1),
    ("decode", 1024, 1),
    ("decode", 4096, 1),
    ("decode", 1024, 8),
)
OPERATORS_AT = (("prefill", 512, 1), ("decode", 1024, 1))
BANDWIDTH = 900e9  # bytes a second of a V100, the card without bfloat16 that has most of it


@dataclass(frozen=True)
class Row:
    """One case, and what a layer asks for in it, stock and fixed; and what a forward asks for besides its layers."""

    phase: str
    tokens: int
    batch: int
    attention: str
    stock: Cost
    fixed: Cost
    stock_rest: Cost
    fixed_rest: Cost


def cost_of_layer(model: Any, phase: str, tokens: int, batch: int, fused_norm: bool = True) -> tuple[Cost, Cost]:
    """Of the third layer of `model`, and of the forward besides its layers. fused_norm: see `cost_of`."""
    ask = workloads.prefill if phase == "prefill" else workloads.decode
    found = []
    for count in (2, 3):
        with first_layers(model, count):
            found.append(cost_of(ask(model, tokens, batch), compute=False, fused_norm=fused_norm))
    layer = found[1] - found[0]
    return layer, found[0] - layer - layer


def table_rows(width: str) -> list[Row]:
    """Every case at this width, in float16."""
    workshop, rows = Workshop(torch.device("cpu")), []
    for attention in ("eager", "sdpa"):
        stock, fixed = (workshop.model(variant, width, 3, attention) for variant in ("stock fp16", "fixed fp16"))
        for case in SIZES:
            before, after = (cost_of_layer(model, *case) for model in (stock, fixed))
            rows.append(Row(*case, attention, before[0], after[0], before[1], after[1]))
    return rows


def cells(row: Row) -> list[str]:
    """Of a row of the table: stock → fixed throughout."""
    batch = f", batch {row.batch}" if row.batch > 1 else ""
    times = [f"{cost.moved / BANDWIDTH * 1e6:,.0f}" for cost in (row.stock, row.fixed)]
    return [
        row.attention,
        f"{row.phase} {row.tokens:,}{batch}",
        f"{row.stock.kernels} → {row.fixed.kernels}",
        f"{row.stock.moved / 1e6:,.1f} → {row.fixed.moved / 1e6:,.1f}",
        f"{row.fixed.moved / row.stock.moved:.3f}",
        f"{row.fixed.flops / 1e9:,.2f}",
        f"{times[0]} → {times[1]}",
        f"{row.stock.syncs.total()} → {row.fixed.syncs.total()}",
    ]


HEADS = ("attention", "case", "launches", "MB moved", "ratio", "GFLOP", "µs at 900 GB/s", "syncs")


def render(rows: list[Row], console: Console, operators: bool) -> None:
    """Prints the table, and where asked for the operators that differ, the most bytes first."""
    console.print(plain(HEADS, [cells(row) for row in rows]))
    for row in rows if operators else ():
        if (row.phase, row.tokens, row.batch) in OPERATORS_AT:
            console.print(f"\n{row.attention}, {row.phase} {row.tokens}: fixed less stock, one layer", style="bold")
            print_operators(row.fixed - row.stock, console)
            console.print("besides the layers:")
            print_operators(row.fixed_rest - row.stock_rest, console)


def print_operators(cost: Cost, console: Console) -> None:
    """One line for each operator with its operands: how many more or fewer, and the bytes of one."""
    ordered = sorted(cost.launches.items(), key=lambda entry: -abs(entry[1] * (entry[0].read + entry[0].written)))
    for launch, count in ordered:
        sizes = f"read {launch.read / 1e3:12,.1f} kB  written {launch.written / 1e3:12,.1f} kB"
        console.print(f"  {count:+d} {launch.name:24} {sizes}  {launch.operands}", highlight=False, soft_wrap=True)


def markdown(rows: list[Row], width: str) -> str:
    """The table for the document."""
    about = f"One layer at {width} width in float16, stock → fixed:"
    return f"{about}\n\n{markdown_table(HEADS, [cells(row) for row in rows])}"
