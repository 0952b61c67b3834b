"""What `posttrain tokens` prints: the text with what is learned marked, or a line a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from flows.tables import plain_table
from stages.visible import visible

if TYPE_CHECKING:
    from stages.training.token_view import Reading, ReadRow

LEARNED, READ, MARK = "bold green", "", "bold magenta"
OPEN, CLOSE = "«", "»"


def tokens_tables(reading: Reading, *, one_a_line: bool) -> list[RenderableType]:
    """Every row, and below them how much of it is learned."""
    shown: list[RenderableType] = []
    for row in reading.rows:
        shown.append(_heading(row))
        if row.parts:
            shown.append(_by_token(reading, row) if one_a_line else _text(row))
    return [*shown, _summary(reading)]


def _heading(row: ReadRow) -> Text:
    learned = row.count(learned=True)
    counts = f" {row.count():,} tokens" + (f", {learned:,} learned" if learned else "") if row.parts else " not used"
    return Text.assemble(("row ", "dim"), (row.row_id, "bold"), counts, (f" ({row.state})", "dim"))


def _text(row: ReadRow) -> Text:
    text = Text()
    named = len(row.parts) > 1
    for index, (name, spans) in enumerate(row.parts):
        if named:
            text.append(("\n" if index else "") + f"{name}: ", style="cyan")
        for span in spans:
            shown = visible(span.text).replace("\n", "↵\n")
            if span.learned:
                text.append(OPEN, style=MARK).append(shown, style=LEARNED).append(CLOSE, style=MARK)
            else:
                text.append(shown, style=READ)
    return text


def _by_token(reading: Reading, row: ReadRow) -> Table:
    table = plain_table("position", "part", "id", "token", "learned")
    position = 0
    for name, spans in row.parts:
        for span in spans:
            for token in span.token_ids:
                piece = Text(visible(repr(reading.pieces[token])[1:-1]), style=LEARNED if span.learned else READ)
                table.add_row(str(position), name, str(token), piece, "yes" if span.learned else "")
                position += 1
    return table


def _summary(reading: Reading) -> Text:
    tokens = sum(row.count() for row in reading.rows)
    learned = sum(row.count(learned=True) for row in reading.rows)
    told = "read, to be completed"
    if learned:
        told = f"of which {learned:,} are learned ({learned / tokens:.0%}), between {OPEN} and {CLOSE}"
    return Text(
        f"{len(reading.rows)} of {reading.total:,} rows of input {reading.input} ({reading.type}): {tokens:,} tokens, "
        f"{told}",
        style="dim",
    )
