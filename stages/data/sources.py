"""A source as a stream of rows, each with the place it came from and the id it will keep."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from artifacts.digest import canonical_json
from artifacts.errors import DataError
from stages.data.faults import BadRow, what_is
from stages.data.files import SourceFile, local_copy, locate
from stages.data.plain import digestible
from stages.data.readers import ROWS_PER_BATCH, read_rows, table_rows
from stages.hub_cache import remember
from stages.raised import raised


@dataclass
class Part:
    """One file, table or function of a source. Its digest and row count are known once it is read."""

    name: str
    """As artifacts may hold it: empty for the only part, never a path of a machine."""
    sha256: str = ""
    size: int = 0
    rows: int = 0
    occurrence: int = 0
    """How many parts before it have the same content."""

    def row_id(self, position: str) -> str:
        """24 hex digits that follow from the part's content and the row's position in it."""
        repeated = f":{self.occurrence}" if self.occurrence else ""
        return hashlib.sha256(f"{self.sha256}:{position}{repeated}".encode()).hexdigest()[:24]

    def label(self, position: str) -> str:
        """For ledgers: `part.jsonl row 3` (counted from one)."""
        first, _, rest = position.partition(":")
        return f"{self.name} row {int(first) + 1}{':' if rest else ''}{rest}".strip()


@dataclass(frozen=True)
class SourceRow:
    """`position`: the row's index in its part, `:k` after it where one source row became several."""

    part: int
    position: str
    where: str
    values: dict[str, Any]
    fault: BadRow | None = None
    """Why it has no values: a line of JSON lines that is none."""


@dataclass
class Source:
    """Rows to come and, when they have come, what they came from."""

    stream: Callable[[Source], Iterator[SourceRow]]
    parts: list[Part] = field(default_factory=list)
    ignored: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[SourceRow]:
        return self.stream(self)

    def add(self, name: str) -> int:
        """Begin a part; its number."""
        self.parts.append(Part(name))
        return len(self.parts) - 1

    def finish(self, part: int, sha256: str, size: int, rows: int) -> None:
        """The part is read."""
        done = self.parts[part]
        done.occurrence = sum(other.sha256 == sha256 for other in self.parts[:part])
        done.sha256, done.size, done.rows = sha256, size, rows

    def describe(self) -> list[dict[str, Any]]:
        """For `dataset.json`."""
        return [{"name": part.name, "sha256": part.sha256, "size": part.size, "rows": part.rows} for part in self.parts]


def path_source(url: str, wanted: str, split: str | None, scratch: Path) -> Source:
    """Files, a folder, a glob or a saved dataset at any fsspec URL."""
    located = locate(url, wanted)
    if located.saved is not None:
        saved = located.saved
        return Source(lambda source: _table(source, _load_saved(saved, split), saved.shown))
    several = len(located.files) > 1

    def stream(source: Source) -> Iterator[SourceRow]:
        for file in located.files:
            part = source.add(file.name if several else "")
            with local_copy(file, scratch) as (path, sha256, size):
                count = 0
                for number, row in read_rows(file, path, wanted):
                    count += 1
                    values, fault = ({}, row) if isinstance(row, BadRow) else (row, None)
                    yield SourceRow(part, str(number - 1), f"{file.shown} row {number}", values, fault)
            source.finish(part, sha256, size, count)

    return Source(stream, ignored=located.ignored)


def hub_source(name: str, subset: str | None, split: str | None, revision: str | None) -> Source:
    """A dataset repository of the Hub, `revision`: the commit that its name means. Raises DataError when it cannot be
    loaded."""

    def load() -> Any:
        import datasets

        try:
            loaded = datasets.load_dataset(name, subset, split=split, revision=revision)
        except Exception as error:  # network, permissions and parsing each raise errors of their own
            raise DataError(
                f"cannot load the Hub dataset {name!r}: {type(error).__name__}: {error}; check the name, split and "
                f"network, or give a local copy as source.path"
            ) from error
        if revision is not None:
            remember(name, "dataset", revision)
        return loaded

    return Source(lambda source: _table(source, _one_split(load(), split, name), f"hub:{name}"))


def function_source(function: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> Source:
    """What a user's function yields. Row ids follow from the rows, since there is no file to digest."""

    def rows() -> Iterator[Any]:
        try:
            yield from function(**arguments)
        except Exception as error:  # the user's code may raise anything
            raise DataError(f"source function {name} failed: {raised(error, function)}") from error

    return Source(lambda source: _digested(source, rows(), name))


def mapped(source: Source, function: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> Source:
    """Each row through a user's function, which gives one row, a list of rows, or None.

    A row without result comes as one with empty `values`, so that it can be counted.
    """

    def stream(outer: Source) -> Iterator[SourceRow]:
        outer.parts = source.parts
        for row in source:
            if row.fault is not None:
                yield row
                continue
            try:
                found = function(row.values, **arguments)
            except Exception as error:  # the user's code may raise anything
                raise DataError(f"{row.where}: {name} failed: {raised(error, function)}") from error
            if isinstance(found, dict):
                yield SourceRow(row.part, row.position, row.where, found)
                continue
            if found is not None and not isinstance(found, list):
                raise DataError(f"{row.where}: {name} gave {what_is(found)}; a dict, a list of dicts or None")
            if not found:
                yield SourceRow(row.part, row.position, row.where, {})
            for index, values in enumerate(found or []):
                _require_dict(values, f"{row.where}: {name}")
                yield SourceRow(row.part, f"{row.position}:{index}", f"{row.where} result {index + 1}", values)

    return Source(stream, ignored=source.ignored)


def _digested(source: Source, rows: Iterable[Any], shown: str) -> Iterator[SourceRow]:
    part = source.add("")
    digest, size, count = hashlib.sha256(), 0, 0
    for count, values in enumerate(rows, 1):
        where = f"{shown} row {count}"
        _require_dict(values, where)
        data = canonical_json(digestible(values)) + b"\n"
        digest.update(data)
        size += len(data)
        yield SourceRow(part, str(count - 1), where, values)
    if count == 0:
        raise DataError(f"{shown} gave no row")
    source.finish(part, digest.hexdigest(), size, count)


def _table(source: Source, table: Any, shown: str) -> Iterator[SourceRow]:
    """Arrow rows as they lie, with nothing decoded (images, audio)."""
    batches = table.with_format("arrow").iter(ROWS_PER_BATCH)
    return _digested(source, (row for batch in batches for row in table_rows(batch)), shown)


def _load_saved(folder: SourceFile, split: str | None) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(folder.filesystem.unstrip_protocol(folder.path))
    except Exception as error:  # datasets raises whatever its file system and Arrow raise
        raise DataError(f"cannot read the saved dataset {folder.shown}: {type(error).__name__}: {error}") from error
    return _one_split(loaded, split, folder.shown)


def _one_split(loaded: Any, split: str | None, shown: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        found = f"no split {split!r}" if split else "several splits"
        raise DataError(f"{shown} has {found}; set source.split to one of {', '.join(loaded)}")
    return loaded[split]


def _require_dict(values: Any, where: str) -> None:
    if not isinstance(values, dict):
        raise DataError(f"{where} is {what_is(values)}; a row is a dict of columns")
