"""A table of sample completions, for people: in the log, and in Prefect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stages.context import Context
from stages.visible import visible

ROWS = 4
"""Completions of one table."""
WIDTHS = {"prompt": 40, "completion": 60}
"""Characters of a text that a line of the log has room for."""


def log_completions(context: Context, records: Sequence[Mapping[str, Any]]) -> None:
    """The first completions of a generation."""
    rows = [_row(record) for record in records[:ROWS]]
    title = f"step {records[0]['step']}: completions of the model"
    context.table("completions", title, rows, text_table(rows))


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record people look at."""
    rewards = {name: value for name, value in record.items() if name.startswith("reward")}
    texts = {name: _text(record[name]) for name in WIDTHS}
    return {"row": record["row_id"], **texts, **rewards, "advantage": record["advantage"]}


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned columns, one line a row; texts lose their middle where they are too long (a prompt its beginning)."""
    cells = [[_cell(name, value) for name, value in row.items()] for row in rows]
    table = [list(rows[0]), *cells]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join(lines)


def _cell(name: str, value: Any) -> str:
    if not isinstance(value, str):
        return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
    lines = value.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    text = visible(lines)
    room = WIDTHS.get(name, len(text))
    if len(text) <= room:
        return text
    return f"...{text[3 - room :]}" if name == "prompt" else f"{text[: room - 23]}...{text[-20:]}"


def _text(value: Any) -> str:
    """Of messages, the last one's."""
    if isinstance(value, str):
        return value
    return str(value[-1].get("content") or "") if value else ""
