"""Markdown tables, and the one way in which pages write numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lolcats_common.errors import printable
from lolcats_common.records import Measured

LARGE = 1000  # from here on, digits after the point say nothing


def number(value: float | None, missing: str = "") -> str:
    """Four significant digits, or a large number whole, with separators; `missing` in place of None."""
    if value is None:
        return missing
    return f"{value:,.0f}" if abs(value) >= LARGE else f"{value:.4g}"


def measured(result: Measured | None) -> str:
    """A mean and its standard error, such as ``0.530 ± 0.050``; empty where nothing was measured."""
    if not result:
        return ""
    value, error = result["value"], result.get("stderr")
    if abs(value) >= LARGE:
        return number(value)
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def interval(bounds: Sequence[float] | None) -> str:
    """Both ends of a confidence interval; empty where there is none."""
    return "" if bounds is None else f"{bounds[0]:.3f} … {bounds[1]:.3f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "right") -> str:
    """A table whose first column is text; `align` says where the cells of the others stand. No cell breaks its row."""
    from tabulate import tabulate

    cells = [[printable(str(cell)).replace("|", "\\|") for cell in row] for row in rows]
    columns = ("left", *[align] * (len(header) - 1))
    return tabulate(cells, header, tablefmt="pipe", colalign=columns, disable_numparse=True)
