"""The measured ratios as a picture. Needs the `bench` extra."""

from pathlib import Path
from typing import Any

from .report import describe


def draw(found: dict[str, Any], path: Path) -> None:
    """A dot for each cell with its quartiles, one line each; left of 1 is cheaper than the baseline."""
    import matplotlib  # type: ignore[import-not-found,unused-ignore]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    rows = found["cells"][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.24 * len(rows)))
    for place, row in enumerate(rows):
        low, high = row.get("lower", row["median"]), row.get("upper", row["median"])
        colour = "tab:green" if row["median"] <= 1 else "tab:red"
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot(row["median"], place, "o", color=colour)
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(range(len(rows)), [", ".join(describe(row)[:4]) for row in rows], fontsize=7)
    axes.set_xlabel("ratio to the baseline, of time or of memory; median and quartiles over pairs")
    axes.set_xscale("log")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis("{x:g}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
