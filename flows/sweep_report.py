"""`posttrain report SWEEP`: a sweep as one self-contained HTML page (`flows.reporting.page`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from artifacts import Store
from artifacts.errors import RequestError
from flows.many_runs import NamedRuns, compare_many, sweep_named
from flows.reporting import page
from flows.reporting.charts import PLOT
from flows.reporting.reading import Reader
from flows.reporting.sweep_curves import read_sweep_curves
from flows.reporting.sweep_plots import CELL, CELL_HEIGHT, heat_map, setting_plots
from flows.reporting.sweep_trials import read_trials
from flows.standings import Row, Standings


def write_sweep_report(store: Store, sweep: str, output: Path) -> None:
    """Writes the page of a sweep to `output`, whole or not at all.

    Raises RequestError for an unknown sweep or an output that cannot be written. Artifacts that are missing or damaged
    do not stop it: notes on the page say so.
    """
    page.write(rendered_sweep(store, sweep), output)


def rendered_sweep(store: Store, sweep: str) -> str:
    """The page of a sweep as HTML. Raises RequestError for an unknown one."""
    named = sweep_named(store, sweep)
    if named is None:
        raise RequestError(f"there is no sweep {sweep!r} in {store.url}; `posttrain ls` shows the newest runs")
    return render_sweep_report(store, named)


def keep_page(store: Store, payload: Mapping[str, Any]) -> Path:
    """The page of a sweep that has ended, beside what the first run of its standings left on this machine, with which
    `posttrain gc` clears it away. Raises as `write_sweep_report`."""
    begun = [str(row["run"]) for row in payload["rows"] if row["run"] is not None]
    if not begun:
        raise RequestError("none of its trials has begun")
    output = store.scratch.absolute() / begun[0] / "sweep.html"
    write_sweep_report(store, str(payload["sweep"]), output)
    return output


def render_sweep_report(store: Store, named: NamedRuns) -> str:
    """The page of a sweep (`sweep_named`) as HTML."""
    found = compare_many(store, named)
    by_id = {str(run["run"]): run for run in named.runs}
    runs = [by_id[str(row.run)] for row in found.rows]
    swept = list(dict.fromkeys(name for run in runs for name in run["sweep"]["settings"]))
    metric = found.metrics[0].partition(".")[2] if found.best is not None else None
    return page.render(
        "sweep.html.j2",
        sweep=named.sweep,
        recipe=runs[0]["recipe"],
        recipe_yaml=runs[0].get("recipe_yaml") or "",
        started=min(str(run["started_at"]) for run in named.starts),
        standings=found,
        state=_state(found, max(int(run["sweep"]["trials"]) for run in runs)),
        trials_of=max(int(run["sweep"]["trials"]) for run in runs),
        tally=Counter(row.state for row in found.rows),
        seconds=sum(row.seconds or 0.0 for row in found.rows),
        trials=read_trials(found, runs, store.url),
        plots=setting_plots(found, swept) if metric is not None else (),
        heat=heat_map(found, swept) if metric is not None else None,
        equal=[row for row in found.rows if _is_equal(found, row)],
        level=[row for row in found.rows if _is_level(found, row)],
        unranked=[row for row in found.rows if _is_unranked(found, row)],
        curves=read_sweep_curves(runs, metric, Reader(store)),
        anchors={},
        plot=PLOT,
        cell={"width": CELL, "height": CELL_HEIGHT},
    )


def _state(found: Standings, trials: int) -> str:
    """Of the sweep: of all its trials where they ended alike, else what is worst to know."""
    states = {row.state for row in found.rows}
    if states == {"ok"}:
        return "ok" if len(found.rows) >= trials else "unfinished"
    return next((state for state in ("running", "failed") if state in states), "interrupted")


def _is_equal(found: Standings, row: Row) -> bool:
    """Whether it ended well with the very number of the best, which stands first by the order of the trials alone."""
    if found.first is None or row is found.first or row.state != "ok":
        return False
    own, best = (each.metrics.get(found.metrics[0]) for each in (row, found.first))
    return own is not None and best is not None and own.number is not None and own.number == best.number


def _is_level(found: Standings, row: Row) -> bool:
    """Whether it is not equal, and its interval reaches into that of the best, so that it may be as good."""
    if found.first is None or row is found.first or _is_equal(found, row):
        return False
    (best_low, best_high), (low, high) = (_interval(found, each) for each in (found.first, row))
    if found.best == "highest":
        return best_low is not None and high is not None and high >= best_low
    return best_high is not None and low is not None and low <= best_high


def _interval(found: Standings, row: Row) -> tuple[float | None, float | None]:
    one = row.metrics.get(found.metrics[0])
    return (None, None) if one is None else (one.low, one.high)


def _is_unranked(found: Standings, row: Row) -> bool:
    one = row.metrics.get(found.metrics[0]) if found.metrics else None
    return one is None or one.number is None
