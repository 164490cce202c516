"""Tables of what a proof has measured."""

from ..report import markdown_table
from .cells import Row, grouped, middle, number, ratio, times, worst


def decode(rows: list[Row]) -> str:
    """A line for each width, attention and context: both dtypes, as called and as CUDA graphs."""
    lines = []
    for case, by_dtype in cases(rows):
        half, other = by_dtype.get("fp16", {}), by_dtype.get("bf16", {})
        graphs = [each.get("graph") or {} for each in (half, other)]
        cells = [times(half), middle(half), times(graphs[0]), middle(graphs[0]), middle(other), middle(graphs[1])]
        lines.append([*case, *cells])
    heads = ("width", "attention", "context", "fp16, fixed / stock", "ratio", "as a CUDA graph", "ratio")
    heads += ("bf16, ratio", "bf16 as a graph, ratio")
    return f"A token after a context, {rows[0]['layers']} layers:\n\n{markdown_table(heads, lines)}"


def prompts(rows: list[Row]) -> str:
    """A line for each width, attention and length: both dtypes."""
    lines = []
    for case, by_dtype in cases(rows):
        half, other = by_dtype.get("fp16", {}), by_dtype.get("bf16", {})
        lines.append([*case, times(half), ratio(half), middle(other)])
    heads = ("width", "attention", "tokens", "fp16, fixed / stock", "ratio", "bf16, ratio")
    return f"A prompt, {rows[0]['layers']} layers:\n\n{markdown_table(heads, lines)}"


def cases(rows: list[Row]) -> list[tuple[list[str], dict[str, Row]]]:
    """Width, attention and tokens as cells, and the rows of that case by dtype."""
    groups = grouped(rows, "width", "attention", "tokens").items()
    return [([case[0], case[1], f"{case[2]:,}"], {row["dtype"]: row for row in group}) for case, group in groups]


def host(rows: list[Row]) -> str:
    """CPU time of the calling thread."""
    lines = [[row["dtype"], row["attention"], times(row), ratio(row)] for row in rows]
    about = f"CPU time of the thread that calls a decode step of {rows[0]['layers']} small layers:"
    return f"{about}\n\n{markdown_table(('dtype', 'attention', 'fixed / stock', 'ratio'), lines)}"


def memory(rows: list[Row]) -> str:
    """MB of stock and fixed."""
    lines = [
        [
            row["width"],
            row["attention"],
            f"{row['tokens']:,}",
            number(row, "stock_bytes", "{:,.1f}", 1e-6),
            number(row, "fixed_bytes", "{:,.1f}", 1e-6),
            number(row, "ratio", "{:.3f}"),
        ]
        for row in rows
    ]
    heads = ("width", "attention", "tokens", "stock MB", "fixed MB", "ratio")
    return f"Peak memory of a prompt, above what was there before:\n\n{markdown_table(heads, lines)}"


def planning(rows: list[Row]) -> str:
    """A plan beside a copy of the same bytes."""
    lines = [
        [
            row["width"],
            row["dtype"],
            number(row, "layer_bytes", "{:,.0f}", 1e-6),
            number(row, "copy_s", scale=1e3),
            number(row, "plan_s", scale=1e3),
            number(row, "copies", "{:,.1f}"),
        ]
        for row in rows
    ]
    heads = ("width", "dtype", "MB", "copy, ms", "plan, ms", "plan / copy")
    return f"Planning a layer, beside a copy of its bytes on the device:\n\n{markdown_table(heads, lines)}"


def scores(rows: list[Row]) -> str:
    """Ways to compute eager scores: the worst KL of each, then microseconds of the whole attention around them."""
    ways = list(dict.fromkeys(row["scores"] for row in rows if row["scores"] not in ("stock", "sdpa")))
    measured = [row for row in rows if "weights" not in row]
    kls = [[row for row in rows if row["scores"] == way and "weights" in row] for way in ways]
    lines = [["KL to fp32, at most", "", "", *(worst(each, "kl", "cached_kl") for each in kls)]]
    for (width, phase, tokens), group in grouped(measured, "width", "phase", "tokens").items():
        by_way = {row["scores"]: row for row in group}
        cells = [number(by_way.get(way, {}), "attention_s", "{:,.1f}", 1e6) for way in ("stock", *ways)]
        lines.append([width, f"{phase} {tokens:,}", *cells])
    heads = ("width", "case", "stock", *ways)
    return f"Eager attention with its scores computed otherwise, µs as CUDA graphs:\n\n{markdown_table(heads, lines)}"
