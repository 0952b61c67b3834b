"""A store's files behind fsspec. Single objects are written whole or not at all, so the marker that comes
last is what makes a publication; nothing is renamed."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from artifacts.digest import FileEntry
from artifacts.errors import DamagedError, StoreError
from artifacts.files import Publication, Stored, swap_alone
from artifacts.folder import hash_folder, in_parallel
from artifacts.prefetch import fetched_ahead
from artifacts.retry import Patience, WrongContentError, call
from artifacts.sealed import LARGEST_BYTES

R = TypeVar("R")
PIECE = 16 * 2**20
AHEAD = 4
"""Pieces of a file that are fetched at once: with the files at once, at most 256 MiB in memory."""
THREADS = 4
_one_process = threading.Lock()


class RemoteFiles:
    """The Files protocol on any fsspec file system. `make` gives a fresh instance; one is made per process,
    because a file system with open connections does not survive a fork."""

    def __init__(self, url: str, base: str, make: Callable[[], Any], patience: Patience | None = None) -> None:
        self.url = url.rstrip("/")
        self.local_root: Path | None = None
        self._base = base.rstrip("/")
        self._make = make
        self._patience = patience or Patience()
        self._instance: tuple[int, Any] | None = None

    @property
    def fs(self) -> Any:
        """The file system of this process."""
        if self._instance is None or self._instance[0] != os.getpid():
            self._instance = (os.getpid(), self._make())
        return self._instance[1]

    @property
    def place(self) -> str:
        return self.url

    def probe(self, patience: Patience) -> None:
        """Lists the root: raises StoreError if the store does not answer or refuses."""

        def list_root() -> None:
            try:
                self.fs.ls(self._base, detail=False)
            except FileNotFoundError:
                self._check_empty_root()

        call("open store", self.url, list_root, patience)

    def _check_empty_root(self) -> None:
        """Nothing at the root: a new store, which is well."""

    def path(self, key: str) -> str:
        if not key or key.startswith("/") or ".." in key.split("/"):
            raise DamagedError(f"{self.url} holds {key!r}, a name that leads out of it; delete it")
        return f"{self._base}/{key}"

    def read(self, key: str, most: int = LARGEST_BYTES) -> bytes:
        data = self._call("read", key, partial(self._there, key, partial(self._first, key, most + 1)))
        if len(data) > most:
            where = f"{self.url}/{key}"
            raise DamagedError(f"{where} has more than {most} bytes; nothing that is read as a whole is so large")
        return data

    def _first(self, key: str, count: int) -> bytes:
        """The first so many bytes of a file, or all that it has."""
        data: bytes = self.fs.cat_file(self.path(key), start=0, end=count)
        return data

    def _is_listed(self, key: str) -> bool:
        folder, _, name = key.rpartition("/")
        return name in self.children(folder)

    def _there(self, key: str, fetch: Callable[[], bytes]) -> bytes:
        """What `fetch` gives. A miss makes others do work again, so both of the store's ways to say it must agree."""
        try:
            return fetch()
        except FileNotFoundError:
            if not self._is_listed(key):
                raise
            raise WrongContentError("the store lists it and does not find it") from None

    def write(self, key: str, data: bytes) -> None:
        self._call("write", key, partial(self._pipe_and_check, key, data))

    def _pipe_and_check(self, key: str, data: bytes) -> None:
        """What is acknowledged has been read back: a small file is what makes the large ones count."""
        self._pipe(key, data)
        try:
            found = self._first(key, len(data) + 1)
        except FileNotFoundError:
            raise WrongContentError("the store took it, and then it is not there") from None
        if found != data:
            raise WrongContentError(f"the store took {len(data)} bytes and gives {len(found)} that are not those")

    def swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        with _one_process:
            return swap_alone(self, key, expected, data)

    def touch(self, key: str) -> None:
        """The store copies the file onto itself: what passes through here cannot spoil it, and one that is gone does
        not come back."""
        self._call("touch", key, lambda: self.fs.cp_file(self.path(key), self.path(key)))

    def age(self, key: str) -> float | None:
        def seconds() -> float:
            written: datetime = self.fs.modified(self.path(key))
            return (datetime.now(UTC) - written).total_seconds()

        try:
            return self._call("read the time of", key, seconds)
        except FileNotFoundError:
            return None

    def now(self) -> float:
        return datetime.now(UTC).timestamp()

    def children(self, key: str) -> list[str]:
        try:
            names: list[str] = self._call("list", key, lambda: self.fs.ls(self.path(key), detail=False))
        except FileNotFoundError:
            return []
        return sorted({name.rstrip("/").rsplit("/", 1)[-1] for name in names})

    def changed(self, key: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for path, stored in self.tree(key).items():
            name, _, rest = path.partition("/")
            if rest:
                found[name] = max(stored.modified, found.get(name, 0.0))
        return found

    def tree(self, key: str) -> dict[str, Stored]:
        try:
            found = self._call("list", key, lambda: self.fs.find(self.path(key), detail=True))
        except FileNotFoundError:
            return {}
        prefix = f"{self.path(key)}/"
        return {
            name.removeprefix(prefix): Stored(int(info["size"]), _modified(info))
            for name, info in sorted(found.items())
            if name.startswith(prefix) and info["type"] == "file"
        }

    def take_in(self, folder: Path) -> tuple[FileEntry, ...]:
        return hash_folder(folder)

    def publish(self, publication: Publication) -> None:
        key, entries = publication.key, publication.entries
        in_parallel(lambda entry: self._upload(publication, entry), entries, THREADS)
        for place in publication.foreign(self.tree(key)):
            self.delete(f"{key}/{place}")
        self._call("store", key, partial(self._settle, publication))
        self.write(f"{key}/{publication.marker[0]}", publication.marker[1])

    def _settle(self, publication: Publication) -> None:
        """The store must list every file with its size; what it does not is sent once more."""
        found = self.tree(publication.key)
        for entry in publication.entries:
            place = publication.place(entry)
            if place not in found or found[place].size != entry.size:
                self._upload(publication, entry)
                have = f"has {found[place].size} bytes" if place in found else "is not there"
                raise WrongContentError(f"the store took {entry.size} bytes of {place}, and then it {have}")

    def stream(self, key: str, size: int) -> Iterator[bytes]:
        """In order; the next pieces are on their way while one is used."""

        def piece(start: int, end: int) -> bytes:
            return self._call("read", key, partial(self._there, key, partial(self._piece, key, start, end)))

        yield from fetched_ahead(piece, size, PIECE, AHEAD)

    def _piece(self, key: str, start: int, end: int) -> bytes:
        piece: bytes = self.fs.cat_file(self.path(key), start=start, end=end)
        if len(piece) < end - start and self.fs.info(self.path(key))["size"] >= end:
            raise WrongContentError(f"the store gives {len(piece)} bytes from {start} on instead of {end - start}")
        return piece

    def remove(self, key: str, first: str | None = None) -> None:
        places = [f"{key}/{place}" for place in self.tree(key)]
        if first is not None and f"{key}/{first}" in places:
            self.delete(f"{key}/{first}")
            places.remove(f"{key}/{first}")
        in_parallel(self.delete, places, THREADS)
        self._drop_folder(key)

    def _drop_folder(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._call("delete", key, lambda: self.fs.rm(self.path(key), recursive=True))

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._call("delete", key, lambda: self.fs.rm_file(self.path(key)))

    def unfinished(self) -> dict[str, Stored]:
        """None: a single write is whole or not there."""
        return {}

    def abandon(self, name: str) -> None:
        """There is nothing to clear away."""

    def _upload(self, publication: Publication, entry: FileEntry) -> None:
        key = f"{publication.key}/{publication.place(entry)}"
        source = publication.folder / entry.path

        def put() -> None:
            self._send(source, key, len(publication.entries))

        if not source.is_file() or source.stat().st_size != entry.size:
            raise StoreError(f"{source} changed while it was stored; wait for its writer")
        try:
            self._call("upload", key, put)
        except FileNotFoundError:
            raise StoreError(f"cannot upload {source} to {self.url}/{key}: it has disappeared") from None

    def _pipe(self, key: str, data: bytes) -> None:
        self._make_parent(key)
        self.fs.pipe_file(self.path(key), data)

    def _make_parent(self, key: str) -> None:
        self.fs.makedirs(self.path(key).rsplit("/", 1)[0], exist_ok=True)

    def _send(self, source: Path, key: str, files: int) -> None:
        """One file of so many, seen whole or not at all. fsspec's own put_file opens the target and fills it while
        others look; a store in memory holds the file in memory anyway."""
        self._pipe(key, source.read_bytes())

    def _call(self, operation: str, key: str, function: Callable[[], R]) -> R:
        return call(operation, f"{self.url}/{key}", function, self._patience)


def _modified(info: dict[str, Any]) -> float:
    moment: datetime | float = info["LastModified"] if "LastModified" in info else info["created"]
    return moment.timestamp() if isinstance(moment, datetime) else moment
