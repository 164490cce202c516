"""The benchmark's command line: `python -m benchmarks`, `… cost`, `… keys`, `… gpu` and `… document`."""

import importlib.util
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from . import cells, generation, plot, report, starting
from .models import WIDTHS, Workshop

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
PROOF = Path("build", "gpu.json")
SECTIONS = ("prefill", "decode", "memory", "starting", "demo")
Values = Annotated[list[str] | None, typer.Option(help="May be given several times; all of them if not given.")]


@app.callback(invoke_without_command=True)
def run(  # noqa: PLR0913  # the options of a command
    context: typer.Context,
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SECTIONS)}.")] = None,
    width: Values = None,
    attention: Values = None,
    variant: Values = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Prompt lengths, or contexts of decode.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes.")] = None,
    compiled: Annotated[bool | None, typer.Option(help="Compiled cells alone, or none of them.")] = None,
    full: Annotated[
        bool, typer.Option(help="All cells, not the quick ones alone. Any other choice implies it.")
    ] = False,
    layers: Annotated[int | None, typer.Option(help="Layers of the models; else a number for each width.")] = None,
    seconds: Annotated[float, typer.Option(help="For how long to measure a cell, three pairs at least.")] = 3.0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file to write, and a .png beside it.")] = None,
) -> None:
    """Measure stock, fixed and rivals in pairs. Without any choice, the results are kept in benchmarks/results."""
    if context.invoked_subcommand is not None:
        return
    chosen = {
        "phase": only, "width": width, "attention": attention, "variant": variant, "tokens": tokens, "batch": batch,
        "compiled": None if compiled is None else [compiled],
    }  # fmt: skip
    narrowed = any(value is not None for value in chosen.values())
    grid = [cell for cell in cells.full_grid() if full or narrowed or cells.is_quick(cell)]
    wanted = [cell for cell in grid if all(v is None or getattr(cell, k) in v for k, v in chosen.items())]
    if not wanted and not {"starting", "demo"} & set(only or ()):
        print("nothing measures that: see the values in benchmarks/cells.py.", file=sys.stderr)
        raise typer.Exit(2)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found: dict[str, Any] = {"environment": report.environment(where), "cells": [], "starting": [], "generation": []}
    found["cells"] = list(progress(wanted, where, layers, seconds))
    if (only is None and not narrowed) or "starting" in (only or ()):
        found["starting"] = starting.measure("7b" if full else "0.5b", 2, seconds)
    if (only is None and not narrowed) or "demo" in (only or ()):
        found["generation"] = generation.measure(where, seconds)
    report.render(found, Console())
    path = out or (None if narrowed or layers is not None else report.file_for(found["environment"], full))
    if path is not None:
        report.write(path, found)
        print(f"written to {path.name}")
        draw(found, path.with_suffix(".png"))


def draw(found: dict[str, Any], path: Path) -> None:
    """A picture of the cells, where matplotlib is: figures that took an hour must not be lost for want of it."""
    if found["cells"] and importlib.util.find_spec("matplotlib") is not None:
        plot.draw(found, path)
        print(f"drawn in {path.name}")
    elif found["cells"]:
        print("no picture: install the bench extra for matplotlib.", file=sys.stderr)


def progress(wanted: Iterable[cells.Cell], device: torch.device, layers: int | None, budget: float) -> Any:
    """Measures cell after cell and says each as it comes."""
    workshop, console = Workshop(device), Console(stderr=True, highlight=False)
    for cell in wanted:
        row = cells.measure(cell, workshop, layers, budget)
        console.print("  ".join(report.describe(row)), soft_wrap=True)
        yield row


@app.command()
def cost(
    width: Annotated[str, typer.Option(help=f"One of {', '.join(WIDTHS)}.")] = "7b",
    operators: Annotated[bool, typer.Option(help="Also which operators fixed has more and fewer than stock.")] = False,
    write: Annotated[bool, typer.Option(help="Put the table into docs/performance.md.")] = False,
) -> None:
    """Count what a layer costs, stock and fixed: launches, bytes, FLOPs. Nothing is timed."""
    if width not in WIDTHS:
        raise typer.BadParameter(f"{width!r} is no width: give one of {', '.join(WIDTHS)}.")
    from . import layer_cost

    rows = layer_cost.table_rows(width)
    layer_cost.render(rows, Console(), operators)
    if write:
        report.replace_between_marks(report.DOCUMENT, "layer-cost", layer_cost.markdown(rows, width))


@app.command()
def keys(
    width: Annotated[str, typer.Option(help=f"One of {', '.join(WIDTHS)}.")] = "7b",
    seconds: Annotated[float, typer.Option(help="For how long to measure a case, three pairs at least.")] = 5.0,
    write: Annotated[bool, typer.Option(help="Put the table into docs/performance.md.")] = False,
) -> None:
    """Count and measure a layer with keys in two parts beside the same layer without."""
    if width not in WIDTHS:
        raise typer.BadParameter(f"{width!r} is no width: give one of {', '.join(WIDTHS)}.")
    from . import two_parts

    table = two_parts.markdown(two_parts.measure(width, 3, seconds), width)
    print(table)
    if write:
        report.replace_between_marks(report.DOCUMENT, "two-parts", table)


@app.command()
def gpu(
    device: Annotated[str | None, typer.Option(help="cpu rehearses it; cuda where there is one.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds for all sections together.")] = 420.0,
    only: Annotated[list[str] | None, typer.Option(help="A section, may be given several times.")] = None,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = PROOF,
    resume: Annotated[bool, typer.Option(help="Go on from what the file holds.")] = False,
    in_process: Annotated[bool, typer.Option(help="In this process, which a CUDA error may end.")] = False,
) -> None:
    """Prove the fix on one device and time it, section by section. Exits with 1 if a promise is broken."""
    from .device import prove, supervised, tables

    unknown = sorted(set(only or ()) - set(prove.SECTIONS))
    if unknown:
        raise typer.BadParameter(f"no section {', '.join(unknown)}: give one of {', '.join(prove.SECTIONS)}.")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cpu" or in_process:
        proof = prove.prove(where, budget, only or (), out, resume=resume)
        found, code = proof.found(), supervised.DEVICE_LOST if proof.lost else 1 if proof.broken else 0
    else:
        found = supervised.supervised(str(where), budget, only or list(prove.SECTIONS), out)
        code = 1 if found["broken"] else 0
    if not in_process:
        print(tables.summary(found))
        print(f"written to {out}; `python -m benchmarks document FILE.json` puts it into docs/performance.md")
    raise typer.Exit(code)


@app.command()
def document(results: Annotated[Path, typer.Argument(help="A JSON file of a run.", exists=True)]) -> None:
    """Put what a results file has measured, or a proof has found on a device, into docs/performance.md."""
    found = json.loads(results.read_text(encoding="utf-8"))
    if found.get("proof") == "device":
        from .device import tables

        report.replace_between_marks(report.DOCUMENT, "device", tables.markdown(found))
    else:
        report.replace_between_marks(report.DOCUMENT, "measured", report.markdown(found))


if __name__ == "__main__":
    app()
