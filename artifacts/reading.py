"""Reading small files of which one can tell whether they are right. A wrong byte may have come about on the way, so
what looks damaged is read once more before it is believed."""

from __future__ import annotations

from collections.abc import Callable

from artifacts.digest import sha256_bytes
from artifacts.errors import DamagedError, StoreError
from artifacts.files import Files
from artifacts.sealed import LARGEST_BYTES, unseal


def read_right(files: Files, key: str, is_right: Callable[[bytes], bool], most: int = LARGEST_BYTES) -> bytes:
    """The file, right or as it was found twice. Raises FileNotFoundError; StoreError where the store does not give
    what it says it holds: that is no damage, and nothing may be done again for it."""
    data = files.read(key, most)
    if is_right(data):
        return data
    data = files.read(key, most)
    if is_right(data):
        return data
    folder, _, name = key.rpartition("/")
    listed = files.tree(folder).get(name)
    if listed is not None and listed.size != len(data):
        raise StoreError(
            f"cannot read {files.url}/{key} after 2 attempts in 0 s: the store lists {listed.size} bytes and gives "
            f"{len(data)}; run again, and distrust this store if it happens twice"
        )
    return data


def read_sealed(files: Files, key: str) -> bytes:
    """`read_right` of a sealed file."""
    return read_right(files, key, _is_sealed)


def read_hashed(files: Files, key: str, sha256: str, most: int) -> bytes | None:
    """`read_right` of a file with that digest; None: it is not as it was written."""

    def is_right(data: bytes) -> bool:
        return sha256_bytes(data) == sha256

    data = read_right(files, key, is_right, most)
    return data if is_right(data) else None


def _is_sealed(data: bytes) -> bool:
    try:
        unseal(data, "")
    except DamagedError:
        return False
    return True
