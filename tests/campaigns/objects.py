"""An object store in memory with what the store asks of fsspec: no folders, and names that are listed in order.

fsspec's own looks through all its files for every list; this one finds where a prefix begins, so that a store of many
objects costs no more than one of few.
"""

from __future__ import annotations

import bisect
import errno
import threading
import time
from datetime import UTC, datetime
from typing import Any


class Objects:
    """Path -> (content, seconds when it was written)."""

    def __init__(self) -> None:
        self._objects: dict[str, tuple[bytes, float]] = {}
        self._names: list[str] = []
        self._one_thread = threading.RLock()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        return self._found(path)[0][start:end]

    def pipe_file(self, path: str, data: bytes) -> None:
        with self._one_thread:
            if path not in self._objects:
                bisect.insort(self._names, path)
            self._objects[path] = (bytes(data), time.time())

    def cp_file(self, path: str, to: str) -> None:
        self.pipe_file(to, self._found(path)[0])

    def rm_file(self, path: str) -> None:
        with self._one_thread:  # else the place of one name may be another one's by the time it is deleted
            self._found(path)
            del self._objects[path]
            del self._names[bisect.bisect_left(self._names, path)]

    def rm(self, path: str, recursive: bool = False) -> None:
        names = self._below(path) if recursive else [path]
        if not names:
            raise _missing(path)
        for name in names:
            self.rm_file(name)

    def ls(self, path: str, detail: bool = False) -> list[str]:
        skipped = len(path.rstrip("/")) + 1
        found = {name[:skipped] + name[skipped:].partition("/")[0] for name in self._below(path)}
        if not found:
            raise _missing(path)
        return sorted(found)

    def find(self, path: str, detail: bool = False) -> dict[str, dict[str, Any]]:
        with self._one_thread:
            return {name: self.info(name) for name in self._below(path)}

    def info(self, path: str) -> dict[str, Any]:
        data, written = self._found(path)
        return {"name": path, "size": len(data), "type": "file", "created": datetime.fromtimestamp(written, UTC)}

    def modified(self, path: str) -> datetime:
        written: datetime = self.info(path)["created"]
        return written

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There are no folders."""

    def _found(self, path: str) -> tuple[bytes, float]:
        try:
            return self._objects[path]
        except KeyError:
            raise _missing(path) from None

    def _below(self, path: str) -> list[str]:
        prefix = path.rstrip("/") + "/"
        with self._one_thread:
            first = bisect.bisect_left(self._names, prefix)
            end = first
            while end < len(self._names) and self._names[end].startswith(prefix):
                end += 1
            return self._names[first:end]


def _missing(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "no such object", path)
