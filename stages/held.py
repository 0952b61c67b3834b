"""A stage's process holds what it reads from outside the store to the content that its fingerprint was made of.

Between the plan, which hashes files and folders, and the last of a stage's reads, somebody may write to them. What was
made of other content must not be kept under the fingerprint of the old.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from artifacts.errors import RequestError, StageError
from stages.external import HUB, content_of, identity_of_sources, imported_names, source_files
from stages.identity import Named, named_outside
from stages.outside import Outside, last_written
from stages.stage import Config
from stages.user_code.expected import expecting, require_unbroken

_in_force: dict[tuple[str, str], Any] = {}


def content_in_force(kind: str, where: str) -> Any:
    """As `content_of`; within a stage, what was planned."""
    return _in_force[kind, where] if (kind, where) in _in_force else content_of(kind, where)


def planned_outside(config: Config, identity: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[Named]:
    """What a stage reads from outside the store and what may change there, with the content in its identity.

    `inputs`: as `spec.json` has them. Of the Hub a commit is read, which never changes.
    """
    found = named_outside(config, identity["config"])
    for name, wired in inputs.items():
        for entry in wired if isinstance(wired, list) else [wired]:
            if "path" in entry:
                found.append(Named("folder", entry["path"], f"input {name}", entry["digest"]))
    # a text among arguments that led to no file, or the name of something built in, is its own content
    return [named for named in found if named.content != named.where and not named.where.startswith(HUB)]


class Held:
    """What was planned for a stage. Within the `with` block it is that, or an error says what is not."""

    def __init__(self, planned: Sequence[Named], known: Sequence[Mapping[str, Any]], told: Path) -> None:
        """`known`: what the plan saw (`Outside.known`), so that little is hashed again; `told`: a file that is written,
        for the processes that the user's code starts."""
        self._planned, self._told = planned, told
        self._outside = Outside(known)
        self._planned_at = {(one["kind"], one["where"]): float(one["at"]) for one in known}
        self._within = ExitStack()

    def __enter__(self) -> Held:
        """Raises StageError where something is not what was planned."""
        self.require_unchanged()
        files: dict[Path, str] = {}
        packages: set[str] = set()
        for named in self._planned:
            if named.kind == "code":
                found = self._sources(named)
                files |= found
                packages |= imported_names(named.where, found)
        since = _since(min(self._planned_at.values(), default=None))
        self._within.enter_context(
            expecting(files, packages, lambda path: _changed(path, since, _written(path)), self._told)
        )
        self._within.enter_context(_in_force_within(self._planned))
        return self

    def __exit__(self, *_: object) -> None:
        self._within.close()

    def require_unchanged(self) -> None:
        """Before anything is kept. Files are read only where somebody wrote to them since; of code counts what was
        loaded. Raises StageError."""
        require_unbroken()
        for named in self._planned:
            if named.kind == "code":
                continue
            with self._said_of(named):
                now = self._outside.look_again(named.kind, named.where).content
            if now != named.content:
                raise StageError(self._words(named))

    def _sources(self, named: Named) -> dict[Path, str]:
        with self._said_of(named):
            files = source_files(named.where)
            now = identity_of_sources(named.where, files)
        if now != named.content:
            raise StageError(self._words(named))
        return files

    @contextmanager
    def _said_of(self, named: Named) -> Iterator[None]:
        try:
            yield
        except (RequestError, OSError) as error:
            gone = f"{_shown(named)} was there when the run was planned{self._since(named)} and cannot be read any more"
            raise StageError(
                f"{gone}: {error}. Nothing is kept of this stage; run again once it can be read"
            ) from error

    def _words(self, named: Named) -> str:
        text = _changed(_shown(named), self._since(named), last_written(named.kind, named.where))
        if named.kind != "argument":
            return text
        return f"{text}. Files that arguments name count by content: what the code itself writes to, they must not name"

    def _since(self, named: Named) -> str:
        return _since(self._planned_at.get((named.kind, named.where)))


def _shown(named: Named) -> str:
    where = named.where.rpartition(":")[0] if named.kind == "code" else named.where
    # signed URLs hold keys in their query
    return f"{named.field}: {where.partition('?')[0] if '://' in where else where}"


def _changed(what: str, since: str, written: tuple[str, float] | None) -> str:
    last = "" if written is None else f"; of its files {written[0]} was written last, at {_time(written[1])}"
    return (
        f"{what} has changed since the run was planned{since}{last}. Nothing is kept of this stage, which would pass "
        "for made of what was there before; run again, and it counts as it is now"
    )


def _since(planned_at: float | None) -> str:
    return "" if planned_at is None else f" ({_time(planned_at)})"


def _written(path: str) -> tuple[str, float] | None:
    return (Path(path).name, os.stat(path).st_mtime) if os.path.isfile(path) else None


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


@contextmanager
def _in_force_within(planned: Sequence[Named]) -> Iterator[None]:
    before = dict(_in_force)
    _in_force.update({(named.kind, named.where): named.content for named in planned})
    try:
        yield
    finally:
        _in_force.clear()
        _in_force.update(before)
