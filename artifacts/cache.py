"""The local copies of what lies in remote stores: folders named by content, of bounded size in all.

Room is made by the time of last use, by the clock of the cache's own disk. A process holds a shared lock on every
copy that it uses until it ends, so no copy goes while somebody reads it, however many processes share the cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from artifacts.disk import temporary_name
from artifacts.errors import RequestError
from artifacts.folder import scan
from artifacts.local_errors import reported

logger = logging.getLogger(__name__)
VARIABLE = "POSTTRAIN_CACHE_GB"
DEFAULT_GB = 200.0
USES = "uses"
_held: dict[Path, int] = {}
"""Files of uses that this process has locked, until it ends."""


@dataclass(frozen=True)
class Copy:
    """One copy: its key, bytes, and when it was used last."""

    key: str
    size: int
    used: float


def limit_bytes() -> float:
    """$POSTTRAIN_CACHE_GB, or 200 GB. Raises RequestError for what is no number above 0."""
    text = os.environ.get(VARIABLE, "").strip() or str(DEFAULT_GB)
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise RequestError(f"{VARIABLE} is the size of the cache in GB, a number above 0; found {text!r}")
    return value * 1e9


def use(cache: Path, key: str) -> None:
    """From now on until this process ends, nobody makes room by deleting the copy of `key`."""
    path = _use_file(cache, key)
    with reported("use the cache in", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while path not in _held or not _is_at(_held[path], path):
            old = _held.pop(path, None)
            if old is not None:
                os.close(old)
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            _held[path] = descriptor
        os.utime(_held[path])


def make_room(cache: Path, needed: int = 0) -> None:
    """Deletes the copies used longest ago that nobody uses now, until `needed` more bytes keep to the limit."""
    allowed = limit_bytes() - needed
    found = sorted(copies(cache), key=lambda copy: (copy.used, copy.key))
    total = sum(copy.size for copy in found)
    for copy in found:
        if total <= allowed:
            return
        if _delete(cache, copy.key):
            total -= copy.size
    if total > allowed:
        logger.warning(
            "the cache %s is larger than %s allows (%.1f GB): all that is in it is in use",
            cache,
            VARIABLE,
            allowed / 1e9,
        )


def copies(cache: Path) -> Iterator[Copy]:
    """Every copy that is there. One that was never said to be used is older than all others."""
    for pattern in ("artifacts/*/*", "work/*/checkpoints/*"):
        for folder in cache.glob(pattern):
            if folder.name.startswith("."):
                continue
            key = folder.relative_to(cache).as_posix()
            with contextlib.suppress(FileNotFoundError):
                size = sum(status.st_size for status in scan(folder).values())
                yield Copy(key, size, _used(cache, key))


def _used(cache: Path, key: str) -> float:
    try:
        return os.stat(_use_file(cache, key)).st_mtime
    except FileNotFoundError:
        return 0.0


def _delete(cache: Path, key: str) -> bool:
    """False: somebody uses it."""
    path, folder = _use_file(cache, key), cache / key
    with reported("make room in", folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(descriptor, path):
                return False
            away = folder.parent / f".old-{temporary_name()}"
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, away)
            os.unlink(path)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        shutil.rmtree(away, ignore_errors=True)
    return True


def _use_file(cache: Path, key: str) -> Path:
    return cache / USES / key.replace("/", "+")


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
