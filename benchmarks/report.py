"""What was measured, as data, as a table and as Markdown between marks of a document."""

import json
import platform
import re
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from qwen2_fp16_fix.model_status import status

from .models import VOCABULARY

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
MARK = "<!-- {name}:{end} -->"


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on and may be published: versions, the kind of device, threads; no paths, no names."""
    found = status().to_dict()
    on_gpu = device.type == "cuda"
    return {
        "package": found["package"],
        "transformers": found["transformers"],
        "torch": found["torch"],
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "vocabulary": VOCABULARY,
    }


def file_for(environment: dict[str, Any], full: bool) -> Path:
    """Where the results of a run on such a device belong."""
    named = f"{environment['device']}-{environment['threads']}-threads" + ("" if full else "-quick")
    return RESULTS / (re.sub(r"[^a-z0-9.]+", "-", named.lower()) + ".json")


def write(path: Path, found: dict[str, Any]) -> None:
    """As JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def describe(row: dict[str, Any]) -> list[str]:
    """Cells of a row: what, on what, how much, and the ratio with its quartiles."""
    what = "context" if row["phase"] == "decode" else "tokens"
    batch = f", batch {row['batch']}" if row["batch"] > 1 else ""
    compiled = ", compiled" if row["compiled"] else ""
    unit, scale = ("MB", 1e-6) if row["phase"] == "memory" else ("ms", 1e3)
    spread = f"{row['lower']:.3f} to {row['upper']:.3f}" if "lower" in row else "exact" if unit == "MB" else ""
    return [
        f"{row['phase']}{compiled}",
        f"{row['width']} {row['attention']}",
        f"{row['tokens']:,} {what}{batch}",
        f"{row['variant']} / {row['baseline']}",
        f"{row['right'] * scale:,.1f} / {row['left'] * scale:,.1f} {unit}",
        f"{row['median']:.3f}",
        spread,
    ]


HEADS = ("", "width", "size", "what", "each", "ratio", "quartiles")
STARTING_HEADS = ("before the first token", "ms", "stock ms")
DEMO_HEADS = ("demo checkpoint", "stock tokens/s", "fixed tokens/s", "ratio of times")


def render(found: dict[str, Any], console: Console) -> None:
    """Prints the tables. Ratios are right / left: below 1 the fix, or the rival, is cheaper than its baseline."""
    if found["cells"]:
        console.print(f"{found['environment']['device']}, {found['environment']['threads']} threads")
        console.print(plain(HEADS, [describe(row) for row in found["cells"]]))
    if found["starting"]:
        console.print(plain(STARTING_HEADS, starting_rows(found)))
    if found["generation"]:
        console.print(plain(DEMO_HEADS, demo_rows(found)))


def plain(heads: tuple[str, ...], rows: list[list[str]]) -> Table:
    """A table of these, narrow."""
    table = Table(*heads, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*row)
    return table


def starting_rows(found: dict[str, Any]) -> list[list[str]]:
    """Name, milliseconds, stock's milliseconds."""
    return [
        [row["name"], f"{row['seconds'] * 1e3:,.0f}", f"{row['stock_seconds'] * 1e3:,.0f}" if "median" in row else ""]
        for row in found["starting"]
    ]


def demo_rows(found: dict[str, Any]) -> list[list[str]]:
    """Name, stock and fixed tokens per second, ratio of times with its quartiles."""
    return [
        [
            f"{row['attention']} {row['dtype']}",
            f"{row['stock']:,.0f}",
            f"{row['fixed']:,.0f}",
            f"{row['median']:.3f} ({row['lower']:.3f} to {row['upper']:.3f})",
        ]
        for row in found["generation"]
    ]


def markdown(found: dict[str, Any]) -> str:
    """What was measured as tables for the document."""
    where = found["environment"]
    versions = f"transformers {where['transformers']}, torch {where['torch']}"
    about = f"{where['device']}, {where['threads']} threads, {versions}:"
    tables = [
        (HEADS, [describe(row) for row in found["cells"]]),
        (STARTING_HEADS, starting_rows(found)),
        (DEMO_HEADS, demo_rows(found)),
    ]
    return "\n\n".join([about, *(markdown_table(heads, rows) for heads, rows in tables if rows)])


def markdown_table(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [list(heads), ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def replace_between_marks(document: Path, name: str, text: str) -> None:
    """Puts `text` between the marks of that name. Raises ValueError where they are not."""
    begin, end = (MARK.format(name=name, end=end) for end in ("begin", "end"))
    whole = document.read_text(encoding="utf-8")
    if begin not in whole or end not in whole:
        raise ValueError(f"{document.name} has no marks {begin} and {end}: put them where the table belongs.")
    before, _, rest = whole.partition(begin)
    document.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
