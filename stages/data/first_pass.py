"""The first pass of `normalize`: every source row becomes a typed row on disk, or a state in the ledger."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from artifacts.digest import canonical_json
from artifacts.errors import DataError
from stages.data.columns import ColumnPlan
from stages.data.convert import RECOGNIZED, Converter
from stages.data.dataset import column_types
from stages.data.faults import BadRow, Dropped, RowError
from stages.data.ledger import RowLedger
from stages.data.media import refuse_media
from stages.data.plain import plain
from stages.data.schema import ColumnTypes
from stages.data.sources import Source, SourceRow
from stages.data.tools import read, stored
from stages.data.types import Row, required_columns, text_columns
from stages.identity import load_code
from stages.names import nearest
from stages.raised import raised

if TYPE_CHECKING:
    from stages.normalize import NormalizeConfig

DUPLICATE = "duplicate"
BAD = "bad row"
_DIGEST_BYTES = 16


@dataclass
class KeptRows:
    """Rows that passed, on disk in the order of the source, and what selection needs to know of them."""

    file: IO[bytes]
    places: list[tuple[int, str]] = field(default_factory=list)
    """(part, position) of each row."""
    contents: list[bytes] = field(default_factory=list)
    groups: list[bytes] = field(default_factory=list)

    def label(self, index: int, source: Source) -> str:
        part, position = self.places[index]
        return source.parts[part].label(position)

    def rows(self) -> Iterator[Row]:
        """The rows again, from the first."""
        self.file.seek(0)
        for line in self.file:
            yield json.loads(line)


class FirstPass:
    """The first pass: every source row becomes a kept row or a state in the ledger."""

    def __init__(self, config: NormalizeConfig, kept: KeptRows) -> None:
        self.config, self.kept, self.ledger = config, kept, RowLedger()
        self.converter = Converter(config.type, config.system, config.chat_template_kwargs)
        self.types: ColumnTypes | None = None
        self.seen = 0
        self.first_bad: dict[str, str] = {}
        """State -> the first row that was dropped with it: its file, place and fault."""
        self._duplicates: set[bytes] = set()
        self._keep = None if config.filters.keep is None else load_code(config.filters.keep)
        templates: dict[str, Any] = {
            name: value if isinstance(value, str) else [turn.model_dump() for turn in value]
            for name, value in config.templates.items()
        }
        self._plan = ColumnPlan(config.columns, templates, config.keep_columns, RECOGNIZED)

    def take(self, source_row: SourceRow, source: Source) -> None:
        """Raises DataError for a bad row, unless the configuration says to drop it."""
        self.seen += 1
        label = source.parts[source_row.part].label(source_row.position)
        try:
            row = self._convert(source_row, label)
            content = canonical_json(row)
            self._filter(row, source_row.where)
            group = digest = _digest(content)
            if self.config.group_by is not None:
                group = _column_digest(row, [self.config.group_by], source_row.where)
            self._deduplicate(row, digest, source_row.where)
        except Dropped as dropped:
            self.ledger.drop(label, dropped.state, dropped.detail)
            return
        except BadRow as error:
            if self.config.on_bad_row == "fail":
                raise
            state = f"{BAD}: {error.reason}"
            self.first_bad.setdefault(state, error.told)
            self.ledger.drop(label, state, error.detail)
            return
        if self.types is None:
            self.types = column_types(self.converter.type, self.converter.conversational)
        self.types.observe(source_row.where, row)
        self.kept.file.write(content + b"\n")
        self.kept.places.append((source_row.part, source_row.position))
        self.kept.contents.append(digest)
        self.kept.groups.append(group)

    def _convert(self, source_row: SourceRow, label: str) -> Row:
        if source_row.fault is not None:
            raise source_row.fault
        if not source_row.values and self.config.source.function is not None:
            raise Dropped(f"filtered: {short_name(self.config.source.function)}", "gave no row")
        planned = self._plan.apply(source_row.values, source_row.where)
        refuse_media(planned, source_row.where)
        planned = plain(planned, source_row.where)

        def note(reason: str, detail: str) -> None:
            self.ledger.change(reason, label, detail)

        try:
            row = self.converter.convert(planned, source_row.where, note)
        except RowError as error:
            raise error.of(self.config.columns) from None
        row = stored(row, self._message_columns())
        if self.config.keep_columns is None:
            return row
        required = required_columns(self.converter.type, self.converter.conversational)
        required += self.converter.optional
        wanted = {*required, *self.config.keep_columns, *self.config.columns, *self.config.templates}
        return {name: value for name, value in row.items() if name in wanted}

    def _message_columns(self) -> tuple[str, ...]:
        return text_columns(self.converter.type, True) if self.converter.conversational else ()

    def _filter(self, row: Row, where: str) -> None:
        filters = self.config.filters
        columns = text_columns(self.converter.type, self.converter.conversational)
        if not columns and (filters.min_characters or filters.max_characters):
            raise DataError(f"{where}: filters count characters, and a {self.converter.type} row has none; use keep")
        characters = sum(_characters(row[name]) for name in columns)
        if self.converter.type == "stepwise_supervision":
            characters += sum(map(len, row["completions"]))
        if filters.min_characters is not None and characters < filters.min_characters:
            raise Dropped("filtered: min_characters", f"{characters} characters")
        if filters.max_characters is not None and characters > filters.max_characters:
            raise Dropped("filtered: max_characters", f"{characters} characters")
        if self._keep is None:
            return
        name = short_name(str(filters.keep))
        try:
            answer = self._keep(read(copy.deepcopy(row), self._message_columns()))
        except Exception as error:  # the user's code may raise anything
            raise DataError(f"{where}: filter {name} failed: {raised(error, self._keep)}") from error
        if not isinstance(answer, bool):
            raise DataError(f"{where}: filter {name} gave {answer!r}; it must give True or False")
        if not answer:
            raise Dropped(f"filtered: {name}")

    def _deduplicate(self, row: Row, digest: bytes, where: str) -> None:
        wanted = self.config.deduplicate
        if not wanted:
            return
        key = digest if wanted is True else _column_digest(row, wanted, where)
        if key in self._duplicates:
            raise Dropped(DUPLICATE)
        self._duplicates.add(key)


def _column_digest(row: Row, columns: Sequence[str], where: str) -> bytes:
    for column in columns:
        if column not in row:
            found = f"columns {', '.join(row)}{nearest(column, row)}"
            raise RowError(where, column, "no such column to group or deduplicate by", found, "name one of these")
    return _digest(canonical_json([row[column] for column in columns]))


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_DIGEST_BYTES]


def _characters(value: Any) -> int:
    return len(value) if isinstance(value, str) else sum(len(turn["content"]) for turn in value)


def short_name(reference: str) -> str:
    """`rows.py:rows` without its folder."""
    return reference.replace("\\", "/").rsplit("/", 1)[-1]
