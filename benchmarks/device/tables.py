"""What a proof found as tables for docs/performance.md."""

from collections.abc import Callable
from typing import Any

from ..report import markdown_table

Row = dict[str, Any]
Cells = Callable[[Row], list[str]]


def markdown(found: dict[str, Any]) -> str:
    """Every section that has rows, then what was left out and which promises were broken."""
    where, rows = found["environment"], found["rows"]
    threads = "" if "capability" in where else f", {where['threads']} threads"
    card = f", compute capability {where['capability']}" if "capability" in where else ""
    about = f"{where['device']}{card}{threads}, transformers {where['transformers']}, torch {where['torch']}:"
    parts = [about]
    for title, section, heads, cells in TABLES:
        if rows.get(section):
            parts += [f"*{title}*", markdown_table(heads, [cells(row) for row in rows[section]])]
    parts.append(summary(found))
    return "\n\n".join(parts)


def summary(found: dict[str, Any]) -> str:
    """In words: what is missing, and what does not hold."""
    left, broken = len(found["left_out"]), found["broken"]
    said = [f"Left out for want of time: {left} cases." if left else "Nothing was left out."]
    said += ["Broken promises: " + " ".join(broken) if broken else "No promise was broken."]
    return " ".join(said)


def small(row: Row, key: str) -> str:
    """A KL or an error. "not finite" where it was computed and is not; why not where the row says so."""
    if key in row:
        return "not finite" if row[key] is None else f"{row[key]:.1e}"
    return "not available" if "not_available" in row else "failed" if "failed" in row else "–"


def times(row: Row, scale: float = 1e3, unit: str = "ms") -> str:
    """Fixed and stock."""
    return f"{row['right'] * scale:,.2f} / {row['left'] * scale:,.2f} {unit}" if "right" in row else small(row, "right")


def ratio(row: Row) -> str:
    """The median and the quartiles of fixed over stock."""
    return f"{row['median']:.3f} ({row['lower']:.3f} to {row['upper']:.3f})" if "median" in row else "–"


def number(row: Row, key: str, form: str = "{:,.2f}", scale: float = 1.0) -> str:
    """A number, or a dash where there is none."""
    return form.format(row[key] if scale == 1 else row[key] * scale) if row.get(key) is not None else "–"


def yes(row: Row, key: str) -> str:
    """yes, no, or a dash where nobody asked."""
    return "–" if row.get(key) is None else "yes" if row[key] else "no"


def accuracy(row: Row) -> list[str]:
    """KL of stock, of fixed and of fixed over a cache."""
    return [row["weights"], row["dtype"], row["way"], *(small(row, key) for key in KLS)]


def timing(row: Row) -> list[str]:
    """A row of decode or prompts."""
    case = [row["width"], row["dtype"], row["attention"], f"{row['tokens']:,}"]
    return [*case, times(row), ratio(row)]


def decode(row: Row) -> list[str]:
    """A row of decode, with the CUDA graph's."""
    graph = row.get("graph") or {}
    return [*timing(row), times(graph), ratio(graph)]


def launches(row: Row) -> list[str]:
    """Our count, and the profiler's."""
    case = [row["width"], row["attention"], f"{row['phase']} {row['tokens']:,}", row["model"]]
    return [*case, *(number(row, key, "{}") for key in ("counted", "seen", "helpers"))]


KLS = ("stock_kl", "fixed_kl", "cached_kl")
CASE = ("width", "dtype", "attention", "tokens")
#: Title, section, heads and cells.
TABLES: list[tuple[str, str, tuple[str, ...], Cells]] = [
    ("KL to fp32", "accuracy", ("weights", "dtype", "attention", "stock", "fixed", "fixed, over a cache"), accuracy),
    (
        "KL to fp32, keys in two parts",
        "two parts",
        ("weights", "dtype", "attention", "stock", "fixed", "fixed, over a cache"),
        accuracy,
    ),
    (
        "What changes nothing, bit for bit",
        "causality",
        ("attention", "later tokens", "pads"),
        lambda row: [row["way"], yes(row, "future"), yes(row, "pads") if row.get("masks") else "no mask taken"],
    ),
    (
        "KL to fp32 with torch's switches",
        "switches",
        ("switch", "weights", "first position", "attention", "KL"),
        lambda row: [row["switch"], row["weights"], f"{row['start']:,}", row["way"], small(row, "kl")],
    ),
    (
        "Plans made on the device and on a CPU",
        "plans",
        ("weights", "same plans", "same centres"),
        lambda row: [row["weights"], yes(row, "same"), yes(row, "same_centres")],
    ),
    (
        "Kernels a layer",
        "launches",
        ("width", "attention", "case", "model", "counted", "seen by the profiler", "of libraries, besides"),
        launches,
    ),
    ("One token after a context", "decode", (*CASE, "fixed / stock", "ratio", "as a CUDA graph", "ratio"), decode),
    ("A prompt", "prompts", (*CASE, "fixed / stock", "ratio"), timing),
    (
        "Host time of a step of 12 small layers",
        "host",
        ("dtype", "attention", "fixed / stock", "ratio"),
        lambda row: [row["dtype"], row["attention"], times(row), ratio(row)],
    ),
    (
        "Peak memory of a prompt",
        "memory",
        ("width", "attention", "tokens", "stock MB", "fixed MB", "ratio"),
        lambda row: [
            row["width"],
            row["attention"],
            f"{row['tokens']:,}",
            number(row, "stock_bytes", "{:,.1f}", 1e-6),
            number(row, "fixed_bytes", "{:,.1f}", 1e-6),
            number(row, "ratio", "{:.3f}"),
        ],
    ),
    (
        "Planning a layer",
        "planning",
        ("width", "dtype", "MB", "copy, ms", "plan, ms", "plan / copy"),
        lambda row: [
            row["width"],
            row["dtype"],
            number(row, "layer_bytes", "{:,.0f}", 1e-6),
            number(row, "copy_s", scale=1e3),
            number(row, "plan_s", scale=1e3),
            number(row, "copies", "{:,.1f}"),
        ],
    ),
    (
        "Compiled: one graph over a static cache",
        "compiled",
        ("attention", "tokens", "mode", "KL to not compiled", "fixed / stock", "ratio"),
        lambda row: [
            row["attention"],
            f"{row['tokens']:,}",
            row["mode"],
            small(row, "fixed_kl"),
            times(row),
            ratio(row),
        ],
    ),
    (
        "Eager scores computed otherwise, KL to fp32",
        "score accuracy",
        ("weights", "scores", "whole", "over a cache"),
        lambda row: [row["weights"], row["scores"], small(row, "kl"), small(row, "cached_kl")],
    ),
    (
        "Eager scores computed otherwise, time as CUDA graphs",
        "score time",
        ("width", "case", "scores by", "scores, µs", "attention, µs", "error of scores"),
        lambda row: [
            row["width"],
            f"{row['phase']} {row['tokens']:,}",
            row["scores"],
            number(row, "scores_s", "{:,.1f}", 1e6),
            number(row, "attention_s", "{:,.1f}", 1e6),
            small(row, "error"),
        ],
    ),
]
