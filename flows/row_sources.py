"""From a row's id back to the file and the index in it that the row was read from."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stages.data.sources import Part

SOURCE_ID = re.compile(r"[0-9a-f]{24}")
"""What `normalize` calls a row. Rows made of it keep this beginning: `<id>/3` (an answer), `<id>*2` (a copy), ..."""

MOST_RESULTS = 256
"""Rows that a user's function made of one source row: so many are tried."""


@dataclass(frozen=True)
class Place:
    """`index`: of the row in the file, from 0. `result`: which of the rows that a function made of it, from 0."""

    file: str
    sha256: str
    index: int
    result: int | None = None

    def __str__(self) -> str:
        which = "" if self.result is None else f", result {self.result + 1}"
        return f"{self.file or self.sha256[:10]} row {self.index + 1}{which}"


def source_row(row_id: str) -> str | None:
    """The id that `normalize` gave; None: it has none."""
    found = SOURCE_ID.match(row_id)
    return found[0] if found else None


def places(wanted: Collection[str], sources: Iterable[Mapping[str, Any]]) -> dict[str, Place]:
    """Source row id -> its place, of those that come from these files (`Ancestry.sources`).

    Ids are digests of a file's digest and a row's index, so every index is tried; results of functions after that.
    """
    left = set(wanted)
    found: dict[str, Place] = {}
    parts = list(_parts(sources))
    for results in [None, *range(MOST_RESULTS)]:
        for file, part in parts:
            if not left:
                return found
            for index in range(part.rows):
                row_id = part.row_id(str(index) if results is None else f"{index}:{results}")
                if row_id in left:
                    left.discard(row_id)
                    found[row_id] = Place(file, part.sha256, index, results)
    return found


def _parts(sources: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Part]]:
    """Files of equal content are told apart by how many came before, as when they were read."""
    seen: dict[tuple[str, str], int] = {}
    count: dict[str, int] = {}
    for source in sources:
        file, sha256 = str(source["file"]), str(source["sha256"])
        if (file, sha256) not in seen:
            seen[file, sha256] = count.get(sha256, 0)
            count[sha256] = count.get(sha256, 0) + 1
        yield file, Part(file, sha256, rows=int(source["rows"]), occurrence=seen[file, sha256])
