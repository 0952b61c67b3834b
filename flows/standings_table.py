"""How standings are shown: on the terminal, and in Prefect."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flows.closing import STYLES, metric_in_words
from flows.reporting.text import duration, plain
from flows.standings import Row, Standings

WIDEST = 10_000
"""Columns in which every table has room."""
LEAST_HEAD = 8
"""Characters to which the name of a setting or metric is torn at most."""
BETWEEN = 2
"""Blanks between columns."""
LONGEST_ERROR = 120
"""Characters; JSON has all of it, and so has the run's report."""


@dataclass(frozen=True)
class StandingsTable:
    """A row a run, with its id where all are listed; `most`: only the first so many, while others are to come.

    A terminal that is too narrow for all columns has intervals and errors below, goes without `cached` and then without
    `time`, and tears names of settings before values; where even these have no room, each run has lines of its own.
    Run ids stay whole, so that they can be copied.
    """

    found: Standings
    title: str = ""
    most: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = [name for name in columns(self.found) if name != "run" or self.most is None]
        whole = self.table(names)
        if Measurement.get(console, options.update(max_width=WIDEST), whole).maximum <= options.max_width:
            yield whole
            return
        for gone in (("cached",), ("cached", "time")):
            kept = [name for name in names if name not in gone]
            widths = self._widths(kept, options.max_width)
            if widths is not None:
                yield self.table(kept, widths)
                yield from (Text(f"{_label(row)}: {_error(row)}") for row in self._rows if row.error is not None)
                return
        yield from self._lines(names)

    @property
    def _rows(self) -> tuple[Row, ...]:
        return self.found.rows[: self.most]

    @property
    def _more(self) -> str:
        more = len(self.found.rows) - len(self._rows)
        return f"and {more} more" if more else ""

    def table(self, names: Sequence[str], widths: Mapping[str, int] | None = None) -> Table:
        """With these of `columns`. `widths`: in a narrow terminal; an interval then stands below its number."""
        table = Table(title=self.title or None, title_justify="left", box=None, pad_edge=False, header_style="dim")
        for name in names:
            table.add_column(
                name,
                overflow="fold",
                justify="right" if name in self.found.metrics or name == "time" else "left",
                no_wrap=widths is None and name in ("run", "time", "trial"),
                width=None if widths is None else widths[name],
            )
        for row in self._rows:
            cells = _cells(self.found, row) if widths is None else _narrow_cells(self.found, row)
            cell_of = {name: Text(cells[name]) for name in names}
            cell_of["state"].stylize(STYLES.get(row.state, ""))
            table.add_row(*cell_of.values())
        if self._more:
            table.caption, table.caption_justify = self._more, "left"
        return table

    def _widths(self, names: Sequence[str], room: int) -> dict[str, int] | None:
        """Of columns that keep their values whole; None: there is no room for them."""
        rows = [_narrow_cells(self.found, row) for row in self._rows]
        least = {name: max([0, *(len(line) for cells in rows for line in cells[name].split("\n"))]) for name in names}
        whole = {name: max(least[name], len(name)) for name in names}
        for name in names:
            torn = name in self.found.settings or name in self.found.metrics
            least[name] = max(least[name], min(len(name), LEAST_HEAD)) if torn else whole[name]
        widths, left = least, room - sum(least.values()) - BETWEEN * (len(names) - 1)
        if left < 0:
            return None
        while left and widths != whole:
            name = max(names, key=lambda name: whole[name] - widths[name])
            widths, left = {**widths, name: widths[name] + 1}, left - 1
        return widths

    def _lines(self, names: Sequence[str]) -> RenderResult:
        """What the table has, run by run."""
        if self.title:
            yield Text(self.title, style="italic")
        for row in self._rows:
            cells = _cells(self.found, row)
            metrics = [f"{name} {cells[name]}" for name in self.found.metrics]
            yield Text.assemble(
                f"trial {row.trial}  " if row.trial is not None else "",
                (row.state, STYLES.get(row.state, "")),
                "  ",
                ", ".join([*metrics, *filter(None, [cells["time"]])]),
            )
            indented = [" ".join(f"{name}={cells[name]}" for name in self.found.settings), _error(row)]
            if "run" in names:
                indented.insert(1, cells["run"])
            for line in filter(None, indented):
                yield Padding(Text(line, overflow="fold"), (0, 0, 0, 2), expand=False)
        if self._more:
            yield Text(self._more, style="dim")


def many_tables(found: Standings, sweep: str | None) -> list[RenderableType]:
    """Of `posttrain diff`: the table, and what is the same in all."""
    title = "" if sweep is None else heading(sweep, None, found)
    same = [Text(f"the same in all: {', '.join(found.same)}", style="dim")] if found.same else []
    return [StandingsTable(found, title), *same]


def rows_of_text(found: Standings) -> list[dict[str, str]]:
    """The same for Prefect's pages."""
    return [_cells(found, row) for row in found.rows]


def columns(found: Standings) -> list[str]:
    """The heads of the table."""
    first = ["trial"] if any(row.trial is not None for row in found.rows) else []
    return [*first, *found.settings, *found.metrics, "time", "cached", "run", "state"]


def _cells(found: Standings, row: Row) -> dict[str, str]:
    """By `columns`."""
    first = [] if columns(found)[0] != "trial" else ["" if row.trial is None else str(row.trial)]
    settings = [setting_in_words(row.settings[name]) if name in row.settings else "–" for name in found.settings]
    measured = [row.metrics.get(name) for name in found.metrics]
    metrics = ["–" if one is None else metric_in_words(one.value, one.low, one.high) for one in measured]
    cached = f"{row.cached} of {row.stages}" if row.stages else ""
    time = "" if row.seconds is None else duration(row.seconds)
    state = row.state if row.error is None else f"{row.state}: {_error(row)}"
    return dict(zip(columns(found), [*first, *settings, *metrics, time, cached, row.run or "", state], strict=True))


def _narrow_cells(found: Standings, row: Row) -> dict[str, str]:
    """The same with intervals below their numbers, and without the error."""
    cells = _cells(found, row)
    return {**cells, **{name: cells[name].replace(" [", "\n[") for name in found.metrics}, "state": row.state}


def setting_in_words(value: Any) -> str:
    """As a recipe would have it: `1e-5`, `true`, `[0.9, 0.99]`."""
    return re.sub(r"e([-+])0(\d)$", r"e\1\2", plain(value)) if isinstance(value, float) else plain(value)


def _error(row: Row) -> str:
    """Its first line; empty without one."""
    if row.error is None:
        return ""
    first = plain(row.error.strip().splitlines()[0])
    return first if len(first) <= LONGEST_ERROR else first[: LONGEST_ERROR - 1] + "…"


def _label(row: Row) -> str:
    return f"trial {row.trial}" if row.trial is not None else row.run or "a run"


def heading(name: str, recipe: str | None, found: Standings, words: Sequence[str] = ()) -> str:
    """`sweep lr · small · ok · best first: highest judge.accuracy`"""
    judged = [f"best first: {found.best} {found.metrics[0]}"] if found.best is not None else []
    return " · ".join([f"sweep {name}", *([recipe] if recipe else []), *words, *judged])
