"""From the source's columns to ours: renaming, templates, columns to keep. Nothing here knows dataset types."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.data.faults import FILL, RowError, what_is
from stages.names import nearest

Template = str | Sequence[Mapping[str, str]]
"""Text with {field}s, or messages whose contents have them."""

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def template_fields(template: str) -> list[str]:
    """The {field}s of a template. Raises ValueError for a brace that is neither a field nor doubled."""
    fields = []
    for piece in _PIECE.finditer(template):
        if piece.group() in ("{", "}") or piece.group(1) == "":
            raise ValueError(f"a lone brace at character {piece.start() + 1} of {template!r}; write {{{{ or }}}}")
        if piece.group(1) is not None:
            fields.append(piece.group(1))
    return fields


@dataclass(frozen=True)
class ColumnPlan:
    """What to make of a source row's columns."""

    columns: Mapping[str, str]
    """Ours -> theirs; `a.b` goes into objects."""
    templates: Mapping[str, Template]
    keep: Sequence[str] | None
    """Other source columns to keep; None: all."""
    recognized: frozenset[str]
    """Source columns that rows may be made of: they pass whatever `keep` says."""

    def apply(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The row with our columns first. Raises RowError for a column that is not there or is null."""
        made = {ours: self._text(template, row, where, ours) for ours, template in self.templates.items()}
        named = {ours: _present(row, theirs, where) for ours, theirs in self.columns.items()}
        consumed = set(self.columns.values())
        if self.keep is not None:
            for column in self.keep:
                _present(row, column, where, may_be_null=True)
        rest = {
            column: value
            for column, value in row.items()
            if column not in consumed and (self.keep is None or column in self.recognized or column in self.keep)
        }
        return {**rest, **named, **made}

    def _text(self, template: Template, row: Mapping[str, Any], where: str, ours: str) -> Any:
        if isinstance(template, str):
            return fill(template, row, where)
        return [{"role": turn["role"], "content": fill(turn["content"], row, where)} for turn in template]


def fill(template: str, row: Mapping[str, Any], where: str) -> str:
    """The template with the row's columns in its {field}s. Raises RowError for one that is not there or is no text."""

    def piece(found: re.Match[str]) -> str:
        name = found.group(1)
        if name is None:
            return found.group()[0]
        value = _present(row, name, where)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RowError(where, name, "a template takes text or a number", what_is(value))
        return str(value)

    return _PIECE.sub(piece, template)


def _present(row: Mapping[str, Any], name: str, where: str, *, may_be_null: bool = False) -> Any:
    value: Any = row
    if name in row:
        value = row[name]
    else:
        for step in name.split("."):
            if not isinstance(value, Mapping) or step not in value:
                hint = nearest(step, value) if isinstance(value, Mapping) else ""
                found = f"columns {', '.join(row) or 'none'}{hint}"
                raise RowError(where, name, "missing column", found, "name one of these")
            value = value[step]
    if value is None and not may_be_null:
        raise RowError(where, name, "the column is null", do=FILL)
    return value
