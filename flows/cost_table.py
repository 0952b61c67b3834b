"""The ledger of a run or an artifact as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import RenderableType
from rich.text import Text

from flows.costs import Bill
from flows.entries import BROKEN
from flows.reporting.text import duration, number
from flows.tables import STATE_STYLES, plain_table


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.4f}" if seconds < 3600 else f"{seconds / 3600:,.2f}"


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds": ("time", duration),
    "cpu_seconds": ("CPU hours", _hours),
    "gpu_seconds": ("GPU hours", _hours),
    "tokens": ("tokens", lambda value: f"{value:,.0f}"),
    "tokens_per_second": ("tokens/s", lambda value: f"{value:,.0f}"),
    "peak_memory_gb": ("peak memory", lambda value: f"{value:.2f} GB"),
    "mfu": ("MFU", lambda value: f"{value:.1%}"),
    "energy_joules": ("energy", lambda value: f"{number(float(value / 3600))} Wh"),
}
"""Of a Cost: the column, and how its values are written."""


@dataclass(frozen=True)
class CostRows:
    """A row a stage and the sums below, in words; columns of which nothing was measured are left out."""

    head: list[str]
    rows: list[list[str]]
    sums: list[list[str]]


def cost_rows(bill: Bill) -> CostRows:
    """The words of a bill."""
    used = [name for name in COLUMNS if any(getattr(cost, name) is not None for cost in bill.costs)]
    rows = [[cost.stage, cost.state, *(_written(name, getattr(cost, name)) for name in used)] for cost in bill.costs]
    sums = [
        [words, "", *(_written(name, values.get(name)) for name in used)]
        for words, values in (("spent", bill.spent), ("saved by the cache", bill.saved))
        if values
    ]
    return CostRows(["stage", "state", *(COLUMNS[name][0] for name in used)], rows, sums)


def cost_tables(bill: Bill) -> list[RenderableType]:
    """For the terminal."""
    words = cost_rows(bill)
    table = plain_table(*words.head)
    for column in table.columns[2:]:
        column.justify = "right"
    for name, state, *values in words.rows:
        style = STATE_STYLES.get(state, "red" if state in BROKEN else "green")
        table.add_row(Text(name, style="bold"), Text(state, style=style), *values)
    for name, state, *values in words.sums:
        table.add_row(Text(name, style="yellow"), state, *(Text(value, style="yellow") for value in values))
    return [Text(f"ledger of {bill.title}"), table]


def _written(name: str, value: float | None) -> str:
    return "" if value is None else COLUMNS[name][1](value)
