"""The closing table of a run: stage, state, time, main metric, artifact."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from flows.attempts import state_in_words, total_seconds
from flows.entries import BROKEN
from stages.evaluation.scores import VERDICTS
from stages.stage import load_stage

STYLES = {"cached": "cyan", "ran": "green", "failed": "bold red", "interrupted": "magenta", "skipped": "yellow"}
SHORT_ID = 12
"""Hexadecimal digits of an id that are shown; the store finds an artifact by eight."""


def closing_table(payload: Mapping[str, Any], left_out: Collection[str] = ()) -> Table:
    """One row a stage of a run's payload, but for those that were left out."""
    title = f"{payload['recipe']} · run {payload['run']} · {payload['state']}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("stage", style="bold", no_wrap=True)
    table.add_column("state")
    table.add_column("time", justify="right")
    table.add_column("main metric", overflow="fold")  # breaks before its interval
    table.add_column("artifact", overflow="fold", min_width=SHORT_ID + 1)  # between ids
    for name, entry in payload["stages"].items():
        if name in left_out:
            continue
        state = f"[{STYLES[entry['state']]}]{state_in_words(entry)}[/]"
        artifact = ", ".join(short_id(found["id"]) for found in entry["outputs"].values())
        table.add_row(escape(name), state, _time(entry), escape(main_metric(entry)), artifact or _where(entry))
    return table


def _time(entry: Mapping[str, Any]) -> str:
    if entry["state"] not in ("ran", *BROKEN):
        return ""
    total = total_seconds(entry)
    return f"{entry['seconds']:,.1f} s" + ("" if total is None else f", {total:,.1f} s in all")


def _where(entry: Mapping[str, Any]) -> str:
    """Errors are long, and were said when they came."""
    return "its error is above" if entry["error"] else ""


def main_metric(entry: Mapping[str, Any]) -> str:
    """`accuracy 0.712 [0.668, 0.752]`: the metric that stands for its stage (`Stage.headline`), or its first."""
    name = main_name(entry)
    if name is None:
        return ""
    metrics = entry["metrics"]
    return f"{name} {metric_in_words(metrics[name], metrics.get(f'{name}/low'), metrics.get(f'{name}/high'))}"


def main_name(entry: Mapping[str, Any]) -> str | None:
    """The metric that stands for a stage; the same whether it ran or is cached, whose metrics have another order."""
    metrics = entry["metrics"]
    with_interval = sorted(name for name in metrics if f"{name}/low" in metrics)
    verdicts = [name for name in VERDICTS if name in metrics]
    chosen = [load_stage(entry["uses"]).headline(metrics), *verdicts, *with_interval, *sorted(metrics)]
    return next((name for name in chosen if name is not None), None)


def metric_in_words(value: Any, low: Any = None, high: Any = None) -> str:
    """`0.712 [0.668, 0.752]`, where there is an interval."""
    interval = "" if low is None else f" [{format_metric(low)}, {format_metric(high)}]"
    return f"{format_metric(value)}{interval}"


def format_metric(value: Any) -> str:
    """A number in four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_id(identifier: str) -> str:
    """The first digits of an artifact's id."""
    return identifier.removeprefix("sha256:")[:SHORT_ID]
