"""What a proof found, as tables for docs/performance.md: the worst of many rows where single ones say no more."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..report import markdown_table
from . import timing_tables as timing
from .cells import Row, grouped, ratio, small, times, worst

Table = Callable[[list[Row]], str]


def markdown(found: dict[str, Any]) -> str:
    """Every section that has rows, then what was left out and which promises were broken."""
    where, rows = found["environment"], found["rows"]
    threads = "" if "capability" in where else f", {where['threads']} threads"
    card = f", compute capability {where['capability']}" if "capability" in where else ""
    parts = [f"{where['device']}{card}{threads}, transformers {where['transformers']}, torch {where['torch']}:"]
    for sections, table in TABLES:
        chosen = [row for section in sections for row in rows.get(section, [])]
        if chosen:
            parts.append(table(chosen))
    return "\n\n".join([*parts, summary(found)])


def summary(found: dict[str, Any]) -> str:
    """In words: what is missing, and what does not hold."""
    left, broken = len(found["left_out"]), found["broken"]
    said = [f"Left out for want of time: {left} cases." if left else "Nothing was left out."]
    said += ["Broken promises: " + " ".join(broken) if broken else "No promise was broken."]
    return " ".join(said)


def listed(names: Iterable[str]) -> str:
    """Each once, in the order in which they come."""
    return ", ".join(dict.fromkeys(names))


def accuracy(rows: list[Row]) -> str:
    """KL to fp32 by weights and dtype: stock's two ways, and the worst of the fixed model's, cache included."""
    lines = []
    for (weights, dtype), group in grouped(rows, "weights", "dtype").items():
        by_way = {row["way"]: row for row in group}
        fused = [row for row in group if row["way"] != "flex"]
        stock = [small(by_way.get(way, {}), "stock_kl") for way in ("eager", "sdpa")]
        flex = worst([by_way["flex"]], "fixed_kl", "cached_kl") if "flex" in by_way else "–"
        lines.append([weights, dtype, *stock, worst(fused, "fixed_kl", "cached_kl"), flex])
    ran = listed(row["way"] for row in rows if "fixed_kl" in row and row["way"] != "flex")
    missing = listed(row["way"] for row in rows if "not_available" in row)
    said = f"KL to fp32, of a fixed model the largest of these ways, whole and over a cache: {ran}."
    said += f" Not available: {missing}." if missing else ""
    heads = ("weights", "dtype", "stock eager", "stock sdpa", "fixed, at most", "fixed, flex")
    return f"{said}\n\n{markdown_table(heads, lines)}"


def causality(rows: list[Row]) -> str:
    """In a sentence each."""
    ran = [row for row in rows if "future" in row]
    masked = [row for row in ran if row["masks"]]
    said = []
    for what, chosen, key in (("Later tokens", ran, "future"), ("Pads", masked, "pads")):
        same = listed(row["way"] for row in chosen if row[key])
        changed = listed(row["way"] for row in chosen if not row[key])
        said.append(f"{what} change no bit in {same or 'no way'}{f', but in {changed}' if changed else ''}.")
    return " ".join(said)


def switches(rows: list[Row]) -> str:
    """The worst KL of each switch, over weights and first positions."""
    lines = [
        [switch, *(worst([row for row in group if row["way"] == way], "kl") for way in ("eager", "sdpa"))]
        for (switch,), group in grouped(rows, "switch").items()
    ]
    over = listed(row["weights"] for row in rows)
    starts = " and ".join(f"{start:,}" for start in dict.fromkeys(row["start"] for row in rows))
    about = f"KL to fp32 with torch's switches, at most, over weights ({over}) from positions {starts}:"
    return f"{about}\n\n{markdown_table(('switch', 'eager', 'sdpa'), lines)}"


def plans(rows: list[Row]) -> str:
    """In a sentence."""
    same = [row for row in rows if row.get("same") and row.get("same_centres")]
    return f"Plans and centres are those made on a CPU for {len(same)} of {len(rows)} models."


def launches(rows: list[Row]) -> str:
    """Our count and the profiler's, stock and fixed in one line."""
    lines = []
    for case, group in grouped(rows, "width", "attention", "phase", "tokens").items():
        by_model = {row["model"]: row for row in group}
        cells = [counts(by_model.get(model, {})) for model in ("stock", "fixed")]
        lines.append([case[0], case[1], f"{case[2]} {case[3]:,}", *cells])
    about = (
        "Kernels of a layer, counted / seen by torch's profiler + those that libraries start besides, to sum up parts:"
    )
    return f"{about}\n\n{markdown_table(('width', 'attention', 'case', 'stock', 'fixed'), lines)}"


def counts(row: Row) -> str:
    """As `28 / 28 + 5`."""
    seen = f" / {row['seen']} + {row['helpers']}" if row.get("seen") is not None else ""
    return f"{row['counted']}{seen}" if "counted" in row else small(row, "counted")


def compiled(rows: list[Row]) -> str:
    """Fixed and stock."""
    heads = ("attention", "context", "mode", "KL to not compiled", "fixed / stock", "ratio")
    lines = [
        [row["attention"], f"{row['tokens']:,}", row["mode"], small(row, "fixed_kl"), times(row), ratio(row)]
        for row in rows
    ]
    return f"A token, compiled as one graph over a static cache, two layers:\n\n{markdown_table(heads, lines)}"


#: The sections whose rows a table takes.
TABLES: Sequence[tuple[tuple[str, ...], Table]] = [
    (("accuracy", "two parts"), accuracy),
    (("causality",), causality),
    (("switches",), switches),
    (("plans",), plans),
    (("launches",), launches),
    (("decode",), timing.decode),
    (("prompts",), timing.prompts),
    (("host",), timing.host),
    (("memory",), timing.memory),
    (("planning",), timing.planning),
    (("compiled",), compiled),
    (("score accuracy", "score time"), timing.scores),
]
