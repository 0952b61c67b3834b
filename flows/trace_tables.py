"""Lineage as trees and traces of scores as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text
from rich.tree import Tree

from flows.ancestry import Node
from flows.reporting.samples import EXPECTED
from flows.reporting.text import clipped, number, plain, short, turns
from flows.tables import plain_table, short_id
from flows.trace import Row, Sample, Trace
from stages.visible import visible

MOST_CHARACTERS = 80
"""Of a prompt or completion in a table."""


def lineage_tables(down: Node, up: Node) -> list[RenderableType]:
    """What it was made of, and what was made of it."""
    made_of = Tree(_node(down))
    _grow(made_of, down)
    if not up.below:
        return [made_of, Text("nothing in the store was made of it", style="dim")]
    used_by = Tree(Text("used by", style="bold"))
    _grow(used_by, up)
    return [made_of, used_by]


def _grow(tree: Tree, node: Node) -> None:
    for source in node.sources:
        tree.add(_source(source))
    for below in node.below:
        _grow(tree.add(_node(below)), below)


def _node(node: Node) -> Text:
    role = f"{node.role}: " if node.role else ""
    if not node.kind:
        return Text.assemble(role, (short(node.identifier), "yellow"), f" ({node.note})")
    name, kind = (f"@{node.name}", f" {node.kind} ") if node.name else (node.kind, " ")
    text = Text.assemble(role, (name, "bold"), kind)
    text.append(short_id(node.identifier), style="cyan")
    if node.uses:
        text.append(f" by {node.uses}" + (f", run {node.run}" if node.run else ""), style="dim")
    for name, value in node.metrics.items():
        text.append(f" {name} {number(value)}", style="green")
    if node.note or node.repeated:
        text.append(f" ({node.note or 'as above'})", style="dim")
    return text


def _source(source: Mapping[str, Any]) -> Text:
    return Text(
        f"{visible(source['file'] or 'a source')}: {source['rows']:,} rows, sha256 {source['sha256'][:12]}",
        style="yellow",
    )


NEVER = (
    "never: no step had this row of this source; the same text in another place is another row, and stage "
    "contamination compares texts"
)


def trace_tables(found: Trace) -> list[RenderableType]:
    """The number, the trainings behind it, its samples, and the training rows where they were asked for."""
    parts: list[RenderableType] = [_head(found)]
    if found.trainings:
        behind = plain_table("behind the model", "stage", "artifact", "steps", "source rows")
        for training in found.trainings:
            node = training.node
            behind.add_row(
                Text(training.label, style="bold"),
                node.uses,
                short_id(node.identifier),
                f"{training.steps:,}",
                f"{len(training.rows):,}",
            )
        parts.append(behind)
    if found.samples:
        samples = plain_table("row", "source", found.metric, "prompt", "answer", "expected", "trained")
        for sample in found.samples:
            samples.add_row(*_sample(sample))
        parts += [samples, *_left_out(len(found.samples), found.matching, "samples")]
        if found.trainings and not all(sample.row.trained for sample in found.samples):
            parts.append(Text(NEVER, style="dim"))
    else:
        parts.append(Text("no sample is like that", style="dim"))
    if found.rows:
        rows = plain_table("training row", "source", "trained")
        for row in found.rows:
            rows.add_row(Text(visible(row.row_id)), _place(row), _trained(row))
        parts += [rows, *_left_out(len(found.rows), found.rows_behind, "rows")]
    return [*parts, *(Text(note, style="red") for note in found.notes)]


def _left_out(shown: int, there: int, what: str) -> list[RenderableType]:
    return [Text(f"{shown:,} of {there:,} {what}; --limit 0 shows all", style="dim")] if shown < there else []


def _head(found: Trace) -> Text:
    interval = "" if found.low is None or found.high is None else f" [{number(found.low)}, {number(found.high)}]"
    text = Text.assemble(
        (f"{found.metric} {number(found.value)}", "bold green"), f"{interval} of {_node(found.evaluation)}"
    )
    for node in found.evaluation.below:
        text.append(f"\n  {_node(node)}")
    if found.recomputed is None:
        words = "its samples do not tell how it was made"
    elif found.agrees:
        words = f"its {found.counted:,} samples give the same number"
    else:
        words = f"its {found.counted:,} samples give another number: {found.recomputed!r}"
    return text.append(f"\n{words}", style="red" if found.agrees is False else "dim")


def _sample(sample: Sample) -> list[RenderableType]:
    record = sample.record
    expected = next((record[name] for name in EXPECTED if record.get(name) is not None), "")
    answer = record.get("completion", record.get("chosen", ""))
    return [
        Text(visible(sample.row.row_id)),
        _place(sample.row),
        number(float(sample.value)),
        *(Text(_said(value)) for value in (record.get("prompt", ""), answer, expected)),
        _trained(sample.row),
    ]


def _said(value: Any) -> str:
    return clipped(plain(" ".join(text for _, text in turns(value))), MOST_CHARACTERS)


def _place(row: Row) -> Text:
    return Text("" if row.place is None else visible(str(row.place)))


def _trained(row: Row) -> str:
    return "; ".join(f"{label} step {', '.join(map(str, steps))}" for label, steps in row.trained.items()) or "never"
