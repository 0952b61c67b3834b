"""Digests: canonical JSON, SHA-256 of bytes and files, and the digest of a set of files."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, order=True)
class FileEntry:
    """One file of an artifact. `path` is relative, POSIX, NFC; `size` in bytes; `sha256` in hex."""

    path: str
    size: int
    sha256: str


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8. Raises ValueError for NaN and infinities,
    TypeError for anything JSON does not have (also keys that are not strings)."""
    text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def _plain(value: Any) -> Any:
    """Mappings as dicts, sequences as lists; json.dumps alone would turn a key 1 into "1"."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"a JSON key is a string, found {key!r} ({type(key).__name__})")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def sha256_bytes(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file in hex, streamed: the file is never in memory as a whole."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(entries: Iterable[FileEntry]) -> str:
    """The digest that names a set of files: SHA-256 of the canonical JSON of [[path, size, sha256], ...],
    sorted by path. Size counts, so that two contents of one hash but different size stay apart."""
    rows = [[entry.path, entry.size, entry.sha256] for entry in sorted(entries)]
    return sha256_bytes(canonical_json(rows))


def is_sha256(text: object) -> bool:
    """64 lower-case hex digits."""
    return isinstance(text, str) and len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)


def path_problem(path: object) -> str | None:
    """Why a path may not name a file of an artifact; None when it may."""
    if not isinstance(path, str) or not path:
        return "not a name"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "not a plain relative path"
    if "\\" in path or any(unicodedata.category(letter) == "Cc" for letter in path):
        return "a backslash or a control character in the name"
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in path):
        return "the name is not UTF-8"
    if unicodedata.normalize("NFC", path) != path:
        return "the name is not in Unicode form NFC"
    if len(path.encode()) > 900 or any(len(part.encode()) > 255 for part in path.split("/")):
        return "the name is too long for some stores (255 bytes a part, 900 in all)"
    return None


def collisions(paths: Iterable[str]) -> list[str]:
    """Paths that differ only in case, or that need one name as both a file and a folder: some file systems
    would give one of the two back for the other."""
    problems: list[str] = []
    spelling: dict[str, tuple[str, bool]] = {}
    for path in sorted(paths):
        parts = path.split("/")
        for length in range(1, len(parts) + 1):
            name, is_file = "/".join(parts[:length]), length == len(parts)
            known = spelling.setdefault(name.casefold(), (name, is_file))
            if known != (name, is_file):
                problems.append(f"{known[0]} and {path} are one name where case does not count")
                break
    return problems
