"""Finished pieces of a stage that works piece by piece; each carries its SHA-256 in its name."""

from __future__ import annotations

import re
from collections.abc import Iterator

from artifacts.digest import is_sha256, sha256_bytes
from artifacts.errors import DamagedError, MissingError, RequestError, StoreError
from artifacts.files import Files
from artifacts.reading import read_hashed

LARGEST_BYTES = 2**30
"""Of a shard, which is read as a whole."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}")


class Shards:
    """The shards of one fingerprint."""

    def __init__(self, files: Files, fingerprint: str) -> None:
        if not is_sha256(fingerprint):
            raise RequestError(f"not a fingerprint (64 hex digits): {fingerprint!r}")
        self._files = files
        self._key = f"work/{fingerprint}/shards"
        self._saved: dict[str, str] = {}
        """Name -> hash of what this object has saved: a store's list may not have it yet."""

    @staticmethod
    def name_of(file_name: str) -> str:
        """The name of the shard that a file holds: the file's, without its hash."""
        return file_name.rpartition(".")[0]

    def names(self) -> set[str]:
        """Names of the shards that are there."""
        return set(self._versions())

    def save(self, name: str, data: bytes) -> None:
        """Durable on return. Saving a name again replaces it."""
        if not NAME.fullmatch(name):
            raise RequestError(f"a shard's name has letters, digits, '.', '_' and '-' only, found {name!r}")
        if len(data) > LARGEST_BYTES:
            raise StoreError(f"shard {name!r} has {len(data)} bytes; {LARGEST_BYTES} can be read again")
        sha256 = sha256_bytes(data)
        self._files.write(f"{self._key}/{name}.{sha256}", data)
        self._saved[name] = sha256
        for other in self._versions().get(name, []):
            if other != sha256:
                self._files.delete(f"{self._key}/{name}.{other}")

    def load(self, name: str) -> bytes:
        """Raises MissingError, or DamagedError; then compute the shard again and save it."""
        versions = self._versions().get(name, [])
        if name in self._saved and self._saved[name] not in versions:
            versions = [*versions, self._saved[name]]
        if not versions:
            raise MissingError(f"there is no shard {name!r} in {self._files.url}/{self._key}")
        for sha256 in versions:
            if (data := self._read(name, sha256)) is not None:
                return data
        raise DamagedError(f"shard {name!r} in {self._files.url}/{self._key} is damaged; it is computed again")

    def load_all(self) -> Iterator[bytes]:
        """The content of every shard, in no order; damaged ones are left out, as if they were not there."""
        for name, versions in self._versions().items():
            for sha256 in versions:
                if (data := self._read(name, sha256)) is not None:
                    yield data

    def clear(self) -> None:
        """Deletes all of them."""
        self._saved.clear()
        self._files.remove(self._key)

    def _read(self, name: str, sha256: str) -> bytes | None:
        """One version; None: it is damaged, or gone."""
        try:
            return read_hashed(self._files, f"{self._key}/{name}.{sha256}", sha256, LARGEST_BYTES)
        except FileNotFoundError:
            return None

    def _versions(self) -> dict[str, list[str]]:
        """Name -> hashes. More than one: two writers disagreed, or a replacement was interrupted."""
        found: dict[str, list[str]] = {}
        for file_name in self._files.children(self._key):
            name, _, sha256 = file_name.rpartition(".")
            if name and is_sha256(sha256):
                found.setdefault(name, []).append(sha256)
        return found
