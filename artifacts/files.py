"""What the store needs of a place to keep files. A key is a relative POSIX path of a file or folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from artifacts.digest import FileEntry
from artifacts.sealed import LARGEST_BYTES


@dataclass(frozen=True)
class Stored:
    """One stored file: size in bytes (-1: not a regular file), time of its last change by the store's clock
    (seconds since 1970)."""

    size: int
    modified: float


@dataclass(frozen=True)
class Publication:
    """A set of files that appears under `key` all or nothing: the files of `folder` go to `key/payload/...`,
    and `marker` (name, bytes), whose presence means that all of them are there, is written last."""

    folder: Path
    entries: tuple[FileEntry, ...]
    key: str
    payload: str
    marker: tuple[str, bytes]

    def place(self, entry: FileEntry) -> str:
        """Where a file goes, relative to `key`."""
        return f"{self.payload}/{entry.path}" if self.payload else entry.path

    def foreign(self, found: Iterable[str]) -> list[str]:
        """What of the paths below `key` lies among the payload and is none of it. Only a payload with a
        folder of its own is published twice."""
        places = {self.place(entry) for entry in self.entries}
        return [path for path in found if path.startswith(f"{self.payload}/") and path not in places]


class Files(Protocol):
    """A place for files. FileNotFoundError means that the store answered and the file is not there; every
    other failure is a StoreError that names the operation, the object and what to do."""

    url: str
    local_root: Path | None
    """The folder itself when the place is on this machine."""

    @property
    def place(self) -> str:
        """What tells it from every other place: two servers may know the same URL."""

    def read(self, key: str, most: int = LARGEST_BYTES) -> bytes:
        """The whole (small) file. Raises DamagedError where it has more than `most` bytes, of which no more are read:
        whoever else writes there cannot fill the memory."""

    def write(self, key: str, data: bytes) -> None:
        """A whole (small) file, durable and all or nothing; replaces what is there."""

    def swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        """Writes only if the file still holds `expected` (None: does not exist). False: it does not."""

    def touch(self, key: str) -> None:
        """Makes the file new again for whoever deletes by age."""

    def age(self, key: str) -> float | None:
        """Seconds since the file was written, both times by the store's own clock; None: no such file."""

    def now(self) -> float:
        """The store's own time, in seconds since 1970."""

    def children(self, key: str) -> list[str]:
        """Names directly below a folder, sorted; empty when there is none."""

    def changed(self, key: str) -> dict[str, float]:
        """Folders directly below a folder -> when something came into them last, by the store's clock."""

    def tree(self, key: str) -> dict[str, Stored]:
        """Every file below a folder, by path relative to it; empty when there is none."""

    def take_in(self, folder: Path) -> tuple[FileEntry, ...]:
        """Hashes the files of a local folder, which are about to be published."""

    def publish(self, publication: Publication) -> None:
        """Moves or uploads files of a local folder, marker last; replaces damaged ones."""

    def stream(self, key: str, size: int) -> Iterator[bytes]:
        """A file of known size in pieces."""

    def delete(self, key: str) -> None:
        """Deletes one file; silent when absent."""

    def remove(self, key: str, first: str | None = None) -> None:
        """Deletes a folder, in it the marker `first` before the rest; silent when absent."""

    def unfinished(self) -> dict[str, Stored]:
        """Writes that have not ended and whose writer is not known to live: what `abandon` takes -> size and time."""

    def abandon(self, name: str) -> None:
        """Clears an unfinished write away; silent when it has ended."""


def swap_alone(files: Files, key: str, expected: bytes | None, data: bytes) -> bool:
    """`Files.swap` for a caller whom nobody disturbs between reading and writing."""
    try:
        current: bytes | None = files.read(key)
    except FileNotFoundError:
        current = None
    if current != expected:
        return False
    files.write(key, data)
    return True
