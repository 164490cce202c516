"""Rows of a proof as cells of a table."""

from typing import Any

Row = dict[str, Any]


def grouped(rows: list[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows that agree in these entries, in the order in which they come."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def small(row: Row, key: str) -> str:
    """A KL or an error. "not finite" where it was computed and is not; why not where the row says so."""
    if key in row:
        return "not finite" if row[key] is None else f"{row[key]:.1e}"
    return "not available" if "not_available" in row else "failed" if "failed" in row else "–"


def worst(rows: list[Row], *keys: str) -> str:
    """The largest of these entries; "not finite" if one is not, "failed" if a row is."""
    values = [row[key] for row in rows for key in keys if key in row]
    if any("failed" in row for row in rows):
        return "failed"
    return "–" if not values else "not finite" if None in values else f"{max(values):.1e}"


def times(row: Row) -> str:
    """Milliseconds of fixed and of stock."""
    return f"{row['right'] * 1e3:,.2f} / {row['left'] * 1e3:,.2f} ms" if "right" in row else small(row, "right")


def ratio(row: Row) -> str:
    """The median and the quartiles of fixed over stock."""
    return f"{row['median']:.3f} ({row['lower']:.3f} to {row['upper']:.3f})" if "median" in row else "–"


def middle(row: Row) -> str:
    """The median of fixed over stock."""
    return f"{row['median']:.3f}" if "median" in row else small(row, "median")


def number(row: Row, key: str, form: str = "{:,.2f}", scale: float = 1.0) -> str:
    """A number, or a dash where there is none."""
    return form.format(row[key] * scale) if row.get(key) is not None else "–"
