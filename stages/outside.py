"""What a stage reads from outside the store, as it is when somebody looks: its content, and a stamp by which it is
known again, without a byte being read, as long as nobody writes to its files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from artifacts.digest import canonical_json, sha256_bytes
from artifacts.errors import RequestError
from stages.data.files import SourceFile, is_local
from stages.external import content_of, files_of
from stages.hub_cache import note, noted

RACY_SECONDS = 2.0
"""Two writes within a tick of a file system's clock leave equal times, so a file as young as this has no stamp."""

_TAGS = ("ETag", "etag", "generation", "blob_id", "Content-MD5")
"""What file systems call that which another content has another one of; a time alone is too coarse."""


@dataclass(frozen=True)
class Seen:
    """Something outside, and its content as identities have it, at a time (seconds since the epoch)."""

    kind: str
    """As `External.kind`, or `folder`: an input."""
    where: str
    content: Any
    stamp: str | None
    """Digest of its files' names, sizes, inodes and times, or tags; None: nothing tells but its content."""
    at: float
    notes: tuple[str, ...] = ()
    """What was said of how it was understood."""


class Outside:
    """What was seen so far; `known`: by whoever planned."""

    def __init__(self, known: Iterable[Mapping[str, Any]] = ()) -> None:
        self._seen = {(one["kind"], one["where"]): Seen(**one) for one in known}

    def look(self, kind: str, where: str) -> Seen:
        """As it was when it was first looked at, so that all who ask mean one content. Raises RequestError."""
        found = self._seen.get((kind, where)) or self._hashed(kind, where, stamp_of(kind, where))
        for text in found.notes:
            note(text)
        return found

    def look_again(self, kind: str, where: str) -> Seen:
        """As it is now; it is hashed only where its stamp is another one. Raises RequestError."""
        known, stamp = self._seen.get((kind, where)), stamp_of(kind, where)
        if known is not None and stamp is not None and known.stamp == stamp:
            return known
        return self._hashed(kind, where, stamp)

    def content(self, kind: str, where: str) -> Any:
        """`look`, and its content alone."""
        return self.look(kind, where).content

    def known(self, wanted: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
        """What was seen of these (kind, where), as JSON takes it and `Outside` takes it up."""
        return [asdict(self._seen[one]) for one in dict.fromkeys(wanted) if one in self._seen]

    def _hashed(self, kind: str, where: str, stamp: str | None) -> Seen:
        """The stamp was taken before: a file that is written to while it is hashed has another one afterwards."""
        at = time.time()
        with noted() as notes:
            content = content_of(kind, where)
        found = self._seen[kind, where] = Seen(kind, where, content, stamp, at, tuple(notes))
        return found


def stamp_of(kind: str, where: str) -> str | None:
    """See `Seen.stamp`. Raises RequestError where its files cannot be listed."""
    if kind == "code":  # to list its files is to read them
        return None
    youngest = time.time() - RACY_SECONDS
    states = [
        _local_state(file, youngest) if is_local(file.filesystem) else _remote_state(file)
        for file in files_of(kind, where)
    ]
    return None if None in states or not states else sha256_bytes(canonical_json(states))


def last_written(kind: str, where: str) -> tuple[str, float] | None:
    """The name of the file that was written last, and when, in seconds since the epoch; None: nothing here tells."""
    times = []
    with suppress(RequestError, OSError):  # this is said of what has changed, perhaps gone
        local = [file for file in files_of(kind, where) if is_local(file.filesystem)]
        times = [(os.stat(file.path).st_mtime, file.name) for file in local]
    return max(times)[::-1] if times else None


def _local_state(file: SourceFile, youngest: float) -> list[Any] | None:
    try:
        found = os.stat(file.path)
    except OSError:  # it went away
        return None
    if found.st_ctime >= youngest:  # of the times the one that nobody can set
        return None
    return [file.name, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _remote_state(file: SourceFile) -> list[Any] | None:
    try:
        known = file.filesystem.info(file.path)
    except Exception:  # every file system has errors of its own; whoever reads the file says more
        return None
    tag = next((str(known[name]) for name in _TAGS if known.get(name)), None)
    return None if tag is None else [file.name, known.get("size"), tag]
