"""Deployments as a table: `posttrain schedule`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

STYLES = {"scheduled": "green", "paused": "yellow", "on request": "cyan"}


def schedule_table(rows: Sequence[Mapping[str, Any]], url: str) -> Table:
    """One row a deployment. A store that they share is said once."""
    table = Table(title=f"{len(rows)} deployed at {url.removesuffix('/api')}", title_justify="left")
    skipped = any(row["skipped"] for row in rows)
    stores = {str(row["store"]) for row in rows}
    if len(stores) == 1:
        table.caption, table.caption_justify = escape(f"results go to the store {min(stores)}"), "left"
    times = ("next run", "last run", *(["last skipped"] if skipped else []))
    for column in ("name", "state", "schedule", *times, "pool", "recipe"):
        table.add_column(column, style="bold" if column == "name" else "")
    if len(stores) > 1:
        table.add_column("store")
    for row in rows:
        last = row["last"]
        table.add_row(
            escape(row["name"]),
            f"[{STYLES[row['state']]}]{row['state']}[/]",
            escape("; ".join(row["schedule"])),
            row["next"] or "",
            "" if last is None else escape(f"{last['state']} ({last['run']})"),
            *([escape(row["skipped"]["when"] if row["skipped"] else "")] if skipped else []),
            escape(row["pool"] or ""),
            escape(" ".join([str(row["recipe"]), *(f"--set {text}" for text in (*row["given"], *row["set"]))])),
            *([escape(str(row["store"]))] if len(stores) > 1 else []),
        )
    return table


def of_paused(row: Mapping[str, Any]) -> Iterator[str]:
    """What became of its runs, where it was paused; else nothing."""
    if cancelled := row.get("cancelled"):
        many = f"{len(cancelled)} queued runs that had" if len(cancelled) > 1 else "a queued run that had"
        yield f"{row['name']}: {many} not begun will not run: {', '.join(cancelled)}"
    for name in row.get("going", ()):
        yield f"{row['name']}: its run {name!r} goes on; `posttrain cancel {shlex.quote(name)}` ends it"
