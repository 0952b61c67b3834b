"""What the commands that look after a store print for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from flows.tables import listing_tables as all_tables
from flows.tables import plain_table, short_id, size_in_words

if TYPE_CHECKING:
    from artifacts.survey import Item, Survey
    from artifacts.sweep import Swept
    from artifacts.usage import Row, Usage

ROWS = 20
"""Of a long table people see the largest; `--json` has all."""


def listing_tables(
    url: str, total: int, artifacts: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]
) -> list[RenderableType]:
    """The newest artifacts and runs."""
    parts = all_tables(url, artifacts, runs)
    if len(artifacts) < total:
        parts.insert(2, Text(f"{len(artifacts)} of {total} artifacts, newest first; --limit 0 shows all"))
    return parts


def usage_tables(url: str, found: Usage) -> list[RenderableType]:
    """Every heading with its largest rows."""
    parts: list[RenderableType] = [Text(f"store {url}: {found.artifacts} artifacts, {size_in_words(found.size)}")]
    parts += [_usage_table(heading, rows) for heading, rows in found.tables.items() if rows]
    others = plain_table("besides", "size")
    for name, size in found.others.items():
        others.add_row(name, size_in_words(size))
    return [*parts, others] if found.others else parts


def _usage_table(heading: str, rows: Sequence[Row]) -> Table:
    table = plain_table(heading, "artifacts", "size", "alone")
    for row in rows[:ROWS]:
        table.add_row(Text(row.name), str(row.artifacts), size_in_words(row.size), size_in_words(row.alone))
    if len(rows) > ROWS:
        table.add_row(Text(f"and {len(rows) - ROWS} more"), "", "", "")
    return table


def survey_tables(url: str, found: Survey, swept: Swept | None) -> list[RenderableType]:
    """What goes, one by one where it is not too much, and both sides by their reasons."""
    goes = found.goes if swept is None else swept.deleted
    largest = sorted(goes, key=lambda item: (-item.size, item.name))
    single = plain_table("goes" if swept is None else "deleted", "what", "size", "why")
    for item in largest[:ROWS]:
        name = short_id(item.artifact.digest) if item.artifact is not None else _work_name(item)
        what = item.artifact.kind if item.artifact is not None else item.what
        single.add_row(Text(name), what, size_in_words(item.size), Text(item.reason))
    if len(goes) > ROWS:
        single.add_row(Text(f"and {len(goes) - ROWS} more"), "", "", "")
    parts: list[RenderableType] = [Text(f"store {url}")]
    parts += [single, _by_reason("goes" if swept is None else "deleted", goes)] if goes else []
    parts.append(_by_reason("stays", found.stays))
    parts += [Text(f"{problem}; what it was made from may go", style="red") for problem in found.problems]
    return [*parts, Text(_closing(goes, swept))]


def _work_name(item: Item) -> str:
    """`quickstart/sft work/1f2e3d4c5b6a`; the whole key where nobody knows whose it is."""
    folder, _, fingerprint = item.name.partition("/")
    return f"{item.of} {folder}/{short_id(fingerprint)}" if item.of else item.name


def _by_reason(heading: str, items: Iterable[Item]) -> Table:
    groups: dict[tuple[str, str], tuple[int, int]] = {}
    for item in items:
        count, size = groups.get((item.what, item.ground), (0, 0))
        groups[item.what, item.ground] = count + 1, size + item.size
    table = plain_table(heading, "number", "size", "why")
    for (what, ground), (count, size) in sorted(groups.items(), key=lambda group: -group[1][1]):
        table.add_row(what, str(count), size_in_words(size), Text(ground))
    return table


def _closing(goes: Sequence[Item], swept: Swept | None) -> str:
    size = size_in_words(sum(item.size for item in goes))
    if swept is None:
        return f"{size} would go, nothing was changed; --delete deletes it" if goes else "nothing would go"
    spared = f"; {len(swept.spared)} were used meanwhile and stay" if swept.spared else ""
    return f"{size} deleted{spared}"
