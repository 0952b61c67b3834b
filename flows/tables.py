"""What the command line prints for people, as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from artifacts.errors import Problem
from flows.console import console_of
from flows.plan import Plan
from flows.reporting.text import moment

STATE_STYLES = {"cached": "cyan", "resume": "yellow", "run": "green", "may_run": "blue", "skipped": "dim"}
_WIDTH_WITHOUT_TERMINAL = 200


def show(*parts: RenderableType) -> None:
    """Print to stdout, wrapped to the terminal; in a file or pipe, lines are long unless COLUMNS says how long."""
    console = console_of(width_of_files=_WIDTH_WITHOUT_TERMINAL)
    for index, part in enumerate(parts):
        if index:
            console.print()
        console.print(part)


def plan_table(plan: Plan) -> Table:
    """Each stage that is read or run, with what happens to it and why, one reason a line."""
    table = plain_table("stage", "uses", "decision", "why")
    for name, decision in plan.decisions.items():
        if decision.left_out:
            continue
        state = Text(decision.state_in_words, style=STATE_STYLES[decision.state])
        table.add_row(Text(name, style="bold"), plan.recipe.stages[name].uses.name, state, _lines(decision.reasons))
    return table


def lacking_lines(lacking: Sequence[Problem]) -> Text | None:
    """What a run would be refused for in this environment, though perhaps not in its own; None: nothing."""
    return Text("\n".join(f"here a run would be refused: {problem}" for problem in lacking)) if lacking else None


def stages_table(described: Iterable[Mapping[str, Any]]) -> Table:
    """Every stage in a line."""
    table = plain_table("stage", "what it does", "inputs", "outputs")
    for stage in described:
        inputs = [name if entry["required"] else f"[{name}]" for name, entry in stage["inputs"].items()]
        table.add_row(
            Text(stage["name"], style="bold"),
            Text(stage["summary"]),
            Text(", ".join(inputs)),
            ", ".join(stage["outputs"]),
        )
    return table


def fields_table(head: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    """The fields of a Config with defaults and meanings."""
    table = plain_table(head, "default", "accepts", "meaning")
    for row in rows:
        mark = " (operational)" if row["operational"] else ""
        table.add_row(
            Text(row["name"], style="bold"), Text(row["default"]), Text(row["accepts"]), Text(row["meaning"] + mark)
        )
    return table


def stage_tables(stage: Mapping[str, Any]) -> list[RenderableType]:
    """One stage with its fields, inputs and outputs."""
    fields = fields_table("with", stage["fields"])
    inputs = plain_table("inputs", "kind", "")
    for name, entry in stage["inputs"].items():
        notes = ["required" if entry["required"] else "optional", *(["a list may be given"] if entry["many"] else [])]
        inputs.add_row(Text(name, style="bold"), " or ".join(entry["kinds"]), ", ".join(notes))
    outputs = plain_table("outputs", "kind")
    for name, kind in stage["outputs"].items():
        outputs.add_row(Text(name, style="bold"), kind)
    head = Text.assemble((stage["name"], "bold"), f": {stage['summary']} (version {stage['version']})")
    note = Text("operational: cannot change the result beyond floating-point reordering; never makes a stage run again")
    return [head, fields, *([inputs] if stage["inputs"] else []), outputs, note]


def listing_tables(
    url: str, artifacts: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]
) -> list[RenderableType]:
    """The artifacts and the newest runs of a store."""
    table = plain_table("artifact", "kind", "made by", "files", "size", "aliases")
    for entry in artifacts:
        if "damaged" in entry:
            about: list[RenderableType] = [Text("damaged: " + entry["damaged"], style="red"), "", ""]
        else:
            about = [Text(str(entry["stage"])), str(entry["files"]), size_in_words(entry["bytes"])]
        table.add_row(short_id(entry["id"]), entry["kind"], *about, _lines(references(entry["aliases"])))
    listed = plain_table("run", "recipe", "state", "started", "seconds")
    for entry in runs:
        resumed = [f"{name} resumed at step {step:,}" for name, step in entry.get("resumed", {}).items()]
        values = [
            entry["run"],
            entry.get("damaged") or entry["recipe"],
            "; ".join([str(entry.get("state") or ""), *resumed]),
            moment(entry["started_at"]) if entry.get("started_at") else None,
            entry.get("seconds"),
        ]
        listed.add_row(*(Text("" if value is None else str(value)) for value in values))
    return [Text(f"store {url}"), table, listed]


def description_tables(entry: Mapping[str, Any]) -> list[RenderableType]:
    """One artifact: what it is, how it was made, its files and lineage."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name in ("id", "kind", "aliases"):
        value = references(entry[name]) if name == "aliases" else entry[name]
        facts.add_row(name, Text(value if isinstance(value, str) else ", ".join(value)))
    for section in ("producer", "metrics", "counts", "versions"):
        for name, value in entry[section].items():
            facts.add_row(Text(f"{section}.{name}"), Text(value if isinstance(value, str) else json.dumps(value)))
    files = plain_table("file", "size", "sha256")
    for file in entry["files"]:
        files.add_row(Text(file["path"]), size_in_words(file["size"]), file["sha256"][:16])
    tree = Tree(Text("lineage"))
    _grow(tree, "", entry["lineage"])
    return [facts, files, tree]


def _grow(tree: Tree, name: str, node: Mapping[str, Any] | Sequence[Any]) -> None:
    if not isinstance(node, Mapping):
        for part in node:
            _grow(tree, name, part)
        return
    if "artifact" in node:
        made = f" by {node['stage']}" if node.get("stage") else ""
        text = f"{node['kind']} {short_id(node['artifact'])}{made}"
    else:
        text = str(node.get("source"))
    note = f" ({node['note']})" if node.get("note") else ""
    branch = tree.add(Text(f"{name}: {text}{note}" if name else text + note))
    for below, inner in (node.get("inputs") or {}).items():
        _grow(branch, below, inner)


def short_id(identifier: str) -> str:
    """Enough of an id to find it by."""
    return identifier.removeprefix("sha256:")[:12]


def references(aliases: Sequence[str]) -> list[str]:
    """Aliases as commands and recipes take them; `@mine/dpo.model` only where there is no `@mine/dpo`."""
    return [f"@{name}" for name in aliases if name.rpartition(".")[0] not in aliases]


def size_in_words(size: float) -> str:
    """`1.2 GB`"""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def plain_table(*columns: str) -> Table:
    """Without a box, so that it can be copied."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _lines(texts: Sequence[str]) -> Text:
    return Text("\n".join(texts))
