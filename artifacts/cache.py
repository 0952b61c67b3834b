"""The local copies of what lies in remote stores: folders named by content, of bounded size in all.

A copy has an empty file in `uses`, from before it is fetched until it is deleted: its name says the copy's key and
bytes, so that a list of names tells how much there is at most; its time is that of the last use, by the clock of the
cache's own disk. A process holds every copy that it uses until it ends, so no copy goes while somebody reads it,
however many processes share the cache.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from artifacts.disk import temporary_name
from artifacts.errors import RequestError
from artifacts.folder import scan
from artifacts.holds import alone, hold
from artifacts.local_errors import reported
from artifacts.owner import is_dead

logger = logging.getLogger(__name__)
VARIABLE = "POSTTRAIN_CACHE_GB"
DEFAULT_GB = 200.0
USES = "uses"
ASIDE = "aside"
COUNTED = ".counted"
"""Marks that every copy has its file of uses."""
ROOM = "room"
"""The name with which a process that makes room is alone."""
PATIENCE_SECONDS = 60.0


class Copy(NamedTuple):
    """One copy: its key, and bytes."""

    key: str
    size: int


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


def use(cache: Path, copy: Copy) -> None:
    """From now on the copy counts, fetched or not, and until this process ends nobody makes room by deleting it."""
    path = use_file(cache, copy)
    with reported("use the cache in", path):
        for name in (USES, ASIDE):
            (cache / name).mkdir(parents=True, exist_ok=True)
        _count(cache)
        hold(path.parent, copy.key)
        path.touch()


def make_room(cache: Path) -> None:
    """Deletes the copies used longest ago that nobody uses now, until what is counted keeps to the limit. Whoever
    fetches has counted its own first: of several at once, the last to count sees all of them."""
    limit = limit_bytes()
    with reported("make room in", cache):
        if sum(copy.size for copy in _counted(cache)) <= limit:
            return
        # one after the other, so that none takes what another is deleting for in use; for a stopped one nobody waits
        with alone(cache, ROOM, PATIENCE_SECONDS):
            _delete_oldest(cache, limit)


def _delete_oldest(cache: Path, limit: float) -> None:
    found = list(_counted(cache))
    total = sum(copy.size for copy in found)
    for copy in sorted(found, key=lambda copy: (_used(cache, copy), copy.key)):
        if total <= limit:
            return
        if _delete(cache, copy):
            total -= copy.size
    if total > limit:
        logger.warning(
            "the cache %s is larger than %s allows (%.1f GB): all that is in it is in use", cache, VARIABLE, limit / 1e9
        )


def copies(cache: Path) -> Iterator[Copy]:
    """Every copy that is there, by a walk through all files."""
    for folder in _folders(cache):
        if not folder.name.startswith("."):  # what was put together there once
            with contextlib.suppress(FileNotFoundError):
                size = sum(status.st_size for status in scan(folder).values())
                yield Copy(folder.relative_to(cache).as_posix(), size)


def use_file(cache: Path, copy: Copy) -> Path:
    """By whose name a copy counts, and whose time is that of its last use."""
    return cache / USES / f"{_name(copy.key)}={copy.size}"


def aside(cache: Path, key: str) -> Path:
    """Where a copy is put together, or taken away to; another place each time."""
    return cache / ASIDE / f"{_name(key)}={temporary_name()}"


def clear_after_dead(cache: Path, key: str) -> None:
    """Deletes what processes that died left of a copy that they put together or took away."""
    for path in _left_aside(cache, key):
        if is_dead(path.name.rpartition("=")[2]):
            shutil.rmtree(path, ignore_errors=True)


def _left_aside(cache: Path, key: str) -> list[Path]:
    return [cache / ASIDE / name for name in os.listdir(cache / ASIDE) if name.startswith(f"{_name(key)}=")]


def _counted(cache: Path) -> Iterator[Copy]:
    for name in os.listdir(cache / USES):
        key, _, size = name.rpartition("=")
        if size.isdigit():
            yield Copy(key.replace("+", "/"), int(size))


def _used(cache: Path, copy: Copy) -> float:
    try:
        return os.stat(use_file(cache, copy)).st_mtime
    except FileNotFoundError:
        return 0.0


def _delete(cache: Path, copy: Copy) -> bool:
    """False: somebody uses it. It counts until its last byte is gone."""
    folder = cache / copy.key
    with alone(cache / USES, copy.key) as free:
        if free:
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, aside(cache, copy.key))
            # nobody fetches it now: what else is there is of processes that died
            for path in _left_aside(cache, copy.key):
                shutil.rmtree(path)
            use_file(cache, copy).unlink(missing_ok=True)
    return free


def _count(cache: Path) -> None:
    """Gives every copy of a cache without the mark its file of uses: posttrain had others once, without a size, and
    somebody may have deleted them. A copy that was never said to be used is older than all others."""
    mark = cache / USES / COUNTED
    if mark.exists():
        return
    for copy in copies(cache):
        path = use_file(cache, copy)
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            if not path.exists():
                _note(mark.parent / _name(copy.key), path)
    for folder in _folders(cache):
        if is_dead(folder.name.partition("-")[2]):
            shutil.rmtree(folder, ignore_errors=True)
    mark.touch()


def _note(former: Path, path: Path) -> None:
    try:
        os.rename(former, path)
    except FileNotFoundError:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        os.utime(path, (0, 0))


def _folders(cache: Path) -> Iterator[Path]:
    for pattern in ("artifacts/*/*", "work/*/checkpoints/*"):
        yield from cache.glob(pattern)


def _name(key: str) -> str:
    return key.replace("/", "+")
