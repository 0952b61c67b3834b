"""What a person sees of a sweep: the trials, the live lines of their stages, and how they stand after each.

All goes to stderr but the closing table, as of a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from flows.console import console_of
from flows.standings_table import StandingsTable, heading, setting_in_words
from flows.terminal import WIDTH_OF_FILES, Terminal

if TYPE_CHECKING:
    from flows.decision import Decision
    from flows.entries import Entry
    from flows.listener import Listener
    from flows.standings import Standings
    from flows.sweep import Sweep
    from flows.trial import Trial


BEST_SO_FAR = 5
"""Rows of the table after each trial but the last."""


class SweepTerminal:
    """A listener of a sweep (`flows.sweeping.SweepListener`) that shows it to a person."""

    def __init__(self, sweep: Sweep, *, json: bool = False) -> None:
        self._sweep = sweep
        self._console = console_of(stderr=True, width_of_files=WIDTH_OF_FILES)
        self._closing = console_of(stderr=json, width_of_files=WIDTH_OF_FILES)
        self._terminal = Terminal(json=json, console=self._console)

    def __enter__(self) -> SweepTerminal:
        self._console.print(trials_table(self._sweep))
        self._terminal.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._terminal.__exit__(kind, error, trace)

    def listener(self, trial: Trial) -> Listener:
        """Its stages are shown with the trial's number."""
        return _Numbered(self._terminal, trial)

    def ended(self, trial: Trial, standings: Standings) -> None:
        """How those stand that have begun; the closing table is for all."""
        begun = replace(standings, rows=tuple(row for row in standings.rows if row.state != "waiting"))
        if len(begun.rows) < trial.of or any(row.state == "running" for row in begun.rows):
            title = f"sweep {trial.sweep}: trial {trial.number} of {trial.of} has ended"
            self._console.print(StandingsTable(begun, title, BEST_SO_FAR))

    def finished(self, payload: Mapping[str, Any], standings: Standings) -> None:
        """The closing table, and how the best one gets the recipe's aliases."""
        self._terminal.__exit__(None, None, None)
        title = heading(payload["sweep"], payload["recipe"], standings, [payload["state"]])
        self._closing.print(StandingsTable(standings, title))
        if (first := standings.first) is not None and first.command is not None:
            text = f"to name the best @{payload['recipe']}/..., run it again from the store:\n  {first.command}"
            self._console.print(Text(text), soft_wrap=True)

    def page(self, write: Callable[[], Path]) -> str | None:
        """Writes the page and says where; None, with a word why, where it cannot be: the sweep has ended all the
        same."""
        try:
            path = str(write())
        except Exception as error:
            self._console.print(Text(f"there is no page of the sweep: {error}"), soft_wrap=True)
            return None
        self._console.print(Text(f"as a page: {path}"), soft_wrap=True)
        return path


class _Numbered:
    """The listener of one trial's run."""

    def __init__(self, terminal: Terminal, trial: Trial) -> None:
        self._terminal, self._trial = terminal, trial
        self._beginning = f"{trial.number}/{trial.of} "

    def planned(self, decisions: Mapping[str, Decision]) -> None: ...

    def started(self, name: str, reason: str) -> None:
        self._terminal.started(self._beginning + name, reason)

    def event(self, name: str, event: Mapping[str, Any]) -> None:
        self._terminal.event(self._beginning + name, event)

    def ended(self, name: str, entry: Entry) -> None:
        if self._trial.plan.decisions[name].state != "skipped":  # left out by --only and the like, in all trials
            self._terminal.ended(self._beginning + name, entry)

    def finished(self, payload: Mapping[str, Any]) -> None: ...


def trials_table(sweep: Sweep) -> Table:
    """Each trial with what its stages would do if it were the first; what trials share runs once."""
    states = ("cached", "resume", "run", "may run")
    table = Table(title=f"sweep {sweep.name}", title_justify="left", box=None, pad_edge=False, header_style="dim")
    for name in ("trial", *(axis.name for axis in sweep.axes), *states):
        table.add_column(name, overflow="fold")
    for trial in sweep.trials:
        found = Counter(decision.state.replace("_", " ") for decision in trial.plan.decisions.values())
        settings = [setting_in_words(value) for value in trial.values.values()]
        table.add_row(str(trial.number), *map(Text, settings), *(str(found[state] or "") for state in states))
    return table
