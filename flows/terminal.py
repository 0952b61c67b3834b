"""What a person sees of a run: the plan, a live line a stage, the closing table.

With a terminal the lines are redrawn in place; without one they are printed now and then. All of it goes to
stderr; only the closing table goes to stdout, and with `--json` it too goes to stderr.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flows.attempts import total_seconds
from flows.closing import STYLES, closing_table, main_metric
from flows.console import console_of
from flows.decision import left_out_line
from flows.moved_aliases import in_words as moved_in_words
from stages.visible import visible

if TYPE_CHECKING:
    from collections.abc import Callable

    from flows.decision import Decision

WIDTH_OF_FILES = 140
"""Columns where there is no terminal and COLUMNS is not set."""

BAR, SHORT_BAR, WIDE = 24, 10, 100
"""Columns of a progress bar, and of one in a terminal that is not so wide."""

SECONDS_BETWEEN_LINES = 10.0
"""Without a terminal: at most one line a stage in this time."""


SAID = {"log": "", "command": "dim", "warning": "yellow", "table": ""}
"""Kinds of events that are lines of their own, and how they look in a terminal."""


@dataclass
class StageLine:
    """What is known about a stage that runs now. Times are of this machine's monotonic clock, in seconds."""

    name: str
    started: float
    phase: str = "starting"
    step: int = 0
    total: int = 0
    unit: str = "step"
    values: Mapping[str, float] = field(default_factory=dict)
    first: tuple[float, int] | None = None
    """(time, step) of the first progress seen: a resumed stage did not do the steps before it now."""
    now: float = 0.0
    printed: float = 0.0

    def take(self, event: Mapping[str, Any], now: float) -> None:
        """Update from one event of the stage."""
        self.now = now
        if event["kind"] == "phase":
            self.phase, self.total = event["text"], 0
        elif event["kind"] == "progress":
            self.phase = ""
            self.step, self.total, self.unit = event["step"], event["total"], event["unit"]
            self.values = event["values"]
            if self.first is None or self.first[1] > self.step:
                self.first = (now, self.step)

    def rate(self) -> float | None:
        """Units a second since the first progress; None: not known yet."""
        if self.first is None or self.now <= self.first[0] or self.step <= self.first[1]:
            return None
        return (self.step - self.first[1]) / (self.now - self.first[0])

    def describe(self) -> str:
        """`12/100 steps, 3,120 tokens/s, loss 1.234, 0:41 left`"""
        return ", ".join(filter(None, [self.progress(), self.numbers(), self.left()]))

    def progress(self) -> str:
        """`12/100 steps`, or the phase where there are no steps to count."""
        return f"{self.step:,}/{self.total:,} {self.unit}s" if self.total else self.phase

    def left(self) -> str:
        """`0:41 left`; empty where nobody knows."""
        rate = self.rate()
        return "" if rate is None or self.step >= self.total else f"{clock((self.total - self.step) / rate)} left"

    def numbers(self) -> str:
        """`3,120 tokens/s, loss 1.234`"""
        if not self.total:
            return ""
        parts, rate = [], self.rate()
        if "tokens_per_second" in self.values:
            parts.append(f"{self.values['tokens_per_second']:,.0f} tokens/s")
        elif rate is not None:
            parts.append(f"{rate:,.3g} {self.unit}s/s")
        parts += [f"{name} {self.values[name]:.4g}" for name in ("loss", "reward") if name in self.values]
        return ", ".join(parts)


class Terminal:
    """A listener of a run (`flows.listener.Listener`) that shows it to a person."""

    def __init__(
        self,
        *,
        json: bool = False,
        console: Console | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or console_of(stderr=True, width_of_files=WIDTH_OF_FILES)
        self._closing = console or console_of(stderr=json, width_of_files=WIDTH_OF_FILES)
        self._monotonic = monotonic
        self._lines: dict[str, StageLine] = {}
        self._lock = threading.Lock()
        self._live: Live | None = None
        self._unselected: dict[str, bool] = {}
        """Stages that the plan leaves out -> whether nothing of them is read either, so that no table has them."""

    def __enter__(self) -> Terminal:
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def planned(self, decisions: Mapping[str, Decision]) -> None:
        """Before anything runs: what will be done and why."""
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, decision in decisions.items():
            if decision.state == "skipped":
                self._unselected[name] = decision.left_out
            if not decision.left_out:
                table.add_row(escape(name), decision.state_in_words, escape("; ".join(decision.reasons)))
        self._console.print(table)
        if (left_out := left_out_line(decisions)) is not None:
            self._console.print(Text(left_out), soft_wrap=True)

    def started(self, name: str, reason: str) -> None:
        """A stage process is about to be started."""
        with self._lock:
            now = self._monotonic()
            self._lines[name] = StageLine(name, now, now=now, printed=now)
        if self._live is None:
            self._say(name, f"running: {reason}")

    def event(self, name: str, event: Mapping[str, Any]) -> None:
        """A stage reported something."""
        with self._lock:
            line = self._lines.get(name)
            now = self._monotonic()
            if line is not None:
                line.take(event, now)
            due = self._live is None and line is not None and now - line.printed >= SECONDS_BETWEEN_LINES
            if due and line is not None:
                line.printed = now
        if event["kind"] in SAID:
            self._say(name, event["text"], SAID[event["kind"]])
        elif event["kind"] == "resumed":
            self._say(name, f"resumed at step {event['step']}")
        elif due and line is not None:
            self._say(name, line.describe())

    def ended(self, name: str, entry: Mapping[str, Any]) -> None:
        """A stage is `cached`, `ran`, `failed` or `skipped`; of one that is not selected the plan said all."""
        if name in self._unselected:
            return
        with self._lock:
            self._lines.pop(name, None)
        what = f"{entry['state']} in {clock(entry['seconds'])}" if entry["state"] == "ran" else entry["state"]
        if (total := total_seconds(entry)) is not None:
            what += f", {clock(total)} in all"
        if entry["state"] == "ran" and (metric := main_metric(entry)):
            what += f", {metric}"  # a short stage has printed no line with it
        detail = entry["error"] or (entry["reason"] if entry["state"] != "ran" else "")
        self._say(name, f"{what}{': ' if detail else ''}{detail}", STYLES[entry["state"]])

    def finished(self, payload: Mapping[str, Any]) -> None:
        """The run is over, well or not."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        left_out = [name for name, wholly in self._unselected.items() if wholly]
        self._closing.print(closing_table(payload, left_out))
        if (moved := moved_in_words(payload)) is not None:
            self._console.print(Text(visible(moved)), soft_wrap=True)

    def _say(self, name: str, text: str, style: str = "") -> None:
        self._console.print(Text.assemble((name, "bold"), ": ", (visible(text), style)), soft_wrap=True)

    def _render(self) -> Group:
        with self._lock:
            lines = list(self._lines.values())
            table = Table.grid(padding=(0, 1))
            width, now = self._console.width, self._monotonic()
            bar = BAR if width >= WIDE else SHORT_BAR
            rows = [(line.name, clock(now - line.started), line.progress(), line.left()) for line in lines]
            # what there is room for beside the others, each with a blank; a line that goes on below cannot be redrawn
            room = width - bar - 6 - sum(max(map(len, column)) for column in zip(*rows, strict=True))
            for line, (name, spent, progress, left) in zip(lines, rows, strict=True):
                numbers = Text(line.numbers())
                numbers.truncate(max(room, 1), overflow="ellipsis")
                drawn = ProgressBar(total=line.total or None, completed=line.step, width=bar, pulse=not line.total)
                table.add_row(Text(name, style="bold"), drawn, spent, Text(progress), left, numbers)
        return Group(table)


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
