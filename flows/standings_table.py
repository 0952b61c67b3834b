"""How standings are shown: on the terminal, and in Prefect."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from flows.closing import STYLES, metric_in_words
from flows.reporting.text import duration, plain
from flows.standings import Row, Standings

LONGEST_ERROR = 120
"""Characters; JSON has all of it, and so has the run's report."""


def standings_table(found: Standings, title: str = "") -> Table:
    """A row a run."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for name in columns(found):
        table.add_column(name, overflow="fold", justify="right" if name in (*found.metrics, "time") else "left")
    for row in found.rows:
        cells = _cells(found, row)
        table.add_row(*(Text(text) for text in cells[:-1]), Text(cells[-1], style=STYLES.get(row.state, "")))
    return table


def many_tables(found: Standings, sweep: str | None) -> list[RenderableType]:
    """Of `posttrain diff`: the table, and what is the same in all."""
    title = "" if sweep is None else heading(sweep, None, found)
    same = [Text(f"the same in all: {', '.join(found.same)}", style="dim")] if found.same else []
    return [standings_table(found, title), *same]


def rows_of_text(found: Standings) -> list[dict[str, str]]:
    """The same for Prefect's pages."""
    return [dict(zip(columns(found), _cells(found, row), strict=True)) for row in found.rows]


def columns(found: Standings) -> list[str]:
    """The heads of the table."""
    first = ["trial"] if any(row.trial is not None for row in found.rows) else []
    return [*first, *found.settings, *found.metrics, "time", "cached", "run", "state"]


def _cells(found: Standings, row: Row) -> list[str]:
    first = [] if columns(found)[0] != "trial" else ["" if row.trial is None else str(row.trial)]
    settings = [setting_in_words(row.settings[name]) if name in row.settings else "–" for name in found.settings]
    measured = [row.metrics.get(name) for name in found.metrics]
    metrics = ["–" if one is None else metric_in_words(one.value, one.low, one.high) for one in measured]
    cached = f"{row.cached} of {row.stages}" if row.stages else ""
    time = "" if row.seconds is None else duration(row.seconds)
    return [*first, *settings, *metrics, time, cached, row.run or "", _state(row)]


def setting_in_words(value: Any) -> str:
    """As a recipe would have it: `1e-5`, `true`, `[0.9, 0.99]`."""
    return re.sub(r"e([-+])0(\d)$", r"e\1\2", plain(value)) if isinstance(value, float) else plain(value)


def _state(row: Row) -> str:
    if row.error is None:
        return row.state
    first = plain(row.error.strip().splitlines()[0])
    return f"{row.state}: {first if len(first) <= LONGEST_ERROR else first[: LONGEST_ERROR - 1] + '…'}"


def heading(name: str, recipe: str | None, found: Standings, words: Sequence[str] = ()) -> str:
    """`sweep lr · small · ok · best first: highest judge.accuracy`"""
    judged = [f"best first: {found.best} {found.metrics[0]}"] if found.best is not None else []
    return " · ".join([f"sweep {name}", *([recipe] if recipe else []), *words, *judged])
