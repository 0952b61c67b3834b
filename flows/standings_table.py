"""How standings are shown: on the terminal, and in Prefect."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from flows.closing import STYLES, metric_in_words
from flows.reporting.text import duration, plain
from flows.standings import Row, Standings

WIDEST = 10_000
"""Columns in which every table has room."""
LONGEST_ERROR = 120
"""Characters; JSON has all of it, and so has the run's report."""


@dataclass(frozen=True)
class StandingsTable:
    """A row a run, with its id where all are listed; `most`: only the first so many, while others are to come.

    A terminal that is too narrow for all columns goes without `cached` and tears names of settings before numbers;
    run ids stay whole, so that they can be copied.
    """

    found: Standings
    title: str = ""
    most: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = [name for name in columns(self.found) if name != "run" or self.most is None]
        whole = self.table(names)
        fits = Measurement.get(console, options.update(max_width=WIDEST), whole).maximum <= options.max_width
        yield whole if fits else self.table([name for name in names if name != "cached"], narrow=True)

    def table(self, names: Sequence[str], *, narrow: bool = False) -> Table:
        """With these of `columns`. `narrow`: an interval stands below its number."""
        table = Table(title=self.title or None, title_justify="left", box=None, pad_edge=False, header_style="dim")
        kept = self.found.rows[: self.most]
        rows = [dict(zip(columns(self.found), _cells(self.found, row), strict=True)) for row in kept]
        for name in names:
            number = name in self.found.metrics
            table.add_column(
                name,
                overflow="fold",
                justify="right" if number or name == "time" else "left",
                no_wrap=name in ("run", "time", "trial") or (number and narrow),
            )
            for cells in rows if number and narrow else ():
                cells[name] = cells[name].replace(" [", "\n[")
        for row, cells in zip(kept, rows, strict=True):
            cell_of = {name: Text(cells[name]) for name in names}
            cell_of["state"].stylize(STYLES.get(row.state, ""))
            table.add_row(*cell_of.values())
        if len(kept) < len(self.found.rows):
            table.caption, table.caption_justify = f"and {len(self.found.rows) - len(kept)} more", "left"
        return table


def many_tables(found: Standings, sweep: str | None) -> list[RenderableType]:
    """Of `posttrain diff`: the table, and what is the same in all."""
    title = "" if sweep is None else heading(sweep, None, found)
    same = [Text(f"the same in all: {', '.join(found.same)}", style="dim")] if found.same else []
    return [StandingsTable(found, title), *same]


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
