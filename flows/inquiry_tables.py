"""What the commands that ask about the past print for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from flows.causes import Cause
from flows.compare import RunDifferences, StageResults
from flows.entries import BROKEN
from flows.reporting.text import duration, in_words, moment, number, short
from flows.tables import STATE_STYLES, plain_table
from flows.why import Why

MOST_METRICS = 6
"""Of one stage, in a table; JSON has all."""
_WORDS = {"run": "will run", "may_run": "may run", "resume": "will resume"}


def why_tables(why: Why) -> list[RenderableType]:
    """The causes as a tree, and below it where it all begins."""
    style = STATE_STYLES.get(why.state, "red" if why.state in BROKEN else "green")
    head = Text.assemble((why.stage, "bold"), f" ({why.uses}) ", (_WORDS.get(why.state, why.state), style))
    if why.words:
        head.append(f" {why.words}" if why.state == "resume" else f": {why.words}")
    tree = Tree(head)
    below = tree
    if why.state == "cached" and why.causes:
        below = tree.add(Text(f"which run {why.made_by} made because", style="dim"))
    _grow(below, why.stage, why.causes, set())
    parts: list[RenderableType] = [tree]
    if why.run is not None:
        parts.append(Text(f"in run {why.run} of recipe {why.recipe}", style="dim"))
    if why.compared_with is not None and why.causes:
        parts.append(Text(f"compared with what run {why.compared_with} made", style="dim"))
    if any(cause.because for cause in why.causes):
        roots = [Text.assemble((root.stage, "bold"), f": {root.text}") for root in why.roots]
        parts.append(Text("it begins with\n  ") + Text("\n  ").join(roots))
    return parts


def _grow(tree: Tree, stage: str, causes: Sequence[Cause], seen: set[int]) -> None:
    for cause in causes:
        where = "" if cause.stage == stage else f"{cause.stage}: "
        repeated = bool(cause.because) and id(cause.because) in seen
        seen.add(id(cause.because))
        note = (" (as above)", "dim") if repeated else ""
        branch = tree.add(Text.assemble((where, "bold"), (cause.text, "" if cause.because else "yellow"), note))
        if not repeated:
            _grow(branch, cause.stage, cause.because, seen)


def diff_tables(found: RunDifferences) -> list[RenderableType]:
    """The runs, what differs, and what followed."""
    old, new = found.runs
    runs = plain_table("", "run", "recipe", "state", "started", "time")
    for side, run in zip("AB", found.runs, strict=True):
        runs.add_row(
            side,
            str(run["run"]),
            str(run["recipe"]),
            str(run["state"]),
            moment(run["started_at"]),
            duration(run["seconds"]),
        )
    parts: list[RenderableType] = [runs]
    for title, rows in (("differs", found.causes), ("surroundings", found.surroundings)):
        if rows:
            listed = plain_table(title, "where", "name", "A", "B")
            for row in rows:
                listed.add_row(
                    Text(row.what, style="bold yellow"),
                    Text(", ".join(row.stages)),
                    Text(row.name),
                    _side(row.old),
                    _side(row.new),
                )
            parts.append(listed)
    if not found.causes:
        parts.insert(1, Text(f"{new['run']} has the same recipe, data, code and seeds as {old['run']}"))
    results = plain_table("stage", "A", "B", "result", "metric", "A", "B", "files that differ")
    for stage in found.stages:
        _add_results(results, stage)
    return [*parts, results]


def _add_results(results: Table, stage: StageResults) -> None:
    if {*stage.states} <= {"skipped", None}:
        words = "not run"
    else:
        words = "other" if stage.outputs else "same" if stage.same_fingerprint else "same bytes"
    files = ", ".join(dict.fromkeys(path for paths in stage.files.values() for path in paths))
    rows = list(stage.metrics.items())[:MOST_METRICS] or [("", ("", ""))]
    for index, (name, values) in enumerate(rows):
        head = [
            Text(stage.stage, style="bold"),
            *(Text(state or "–") for state in stage.states),
            Text(words, style="yellow" if stage.differs else "dim"),
        ]
        more = len(stage.metrics) - MOST_METRICS
        last = f"  (and {more} more)" if index == MOST_METRICS - 1 and more > 0 else ""
        results.add_row(
            *(head if index == 0 else [""] * 4),
            Text(name + last),
            *(_side(value) for value in values),
            files if index == 0 else "",
        )


def _side(value: object) -> Text:
    if value is None:
        return Text("–", style="dim")
    return Text(
        short(in_words(value) if isinstance(value, dict | list) else value if isinstance(value, str) else number(value))
    )
