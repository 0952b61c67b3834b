"""Checking stored files against their manifest, and fetching them into a local folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from artifacts.cache import Copy, aside, clear_after_dead, make_room, use
from artifacts.digest import FileEntry
from artifacts.disk import READ_ONLY
from artifacts.errors import DamagedError, MissingError
from artifacts.files import Files
from artifacts.folder import check_folder, differences, in_parallel
from artifacts.local_errors import reported
from artifacts.no_links import require_no_links

THREADS = 4


def problems_of(
    files: Files, key: str, payload: str, expected: tuple[FileEntry, ...], ignore: tuple[str, ...] = ()
) -> list[str]:
    """What of the stored files is not as expected, by content, one line each. `ignore`: files that are no payload."""
    if files.local_root is not None:
        try:
            require_no_links(files.local_root, key)
        except DamagedError as error:
            return [str(error)]
        folder = files.local_root / key / payload
        with reported("read", folder):
            return check_folder(folder, expected, ignore)
    place = f"{key}/{payload}" if payload else key
    found = {path: stored.size for path, stored in files.tree(place).items() if path not in ignore}
    problems = differences(found, expected)
    if problems:
        return problems
    checked = in_parallel(lambda entry: _problem(files, place, entry, lambda piece: None), expected, THREADS)
    return [problem for problem in checked if problem is not None]


def _problem(files: Files, place: str, entry: FileEntry, take: Callable[[bytes], object]) -> str | None:
    sha256, size = hashlib.sha256(), 0
    try:
        for piece in files.stream(f"{place}/{entry.path}", entry.size):
            sha256.update(piece)
            size += len(piece)
            take(piece)
    except FileNotFoundError:
        return f"{entry.path}: missing"
    if size != entry.size:
        return f"{entry.path}: {size} bytes instead of {entry.size}"
    if sha256.hexdigest() != entry.sha256:
        return f"{entry.path}: sha256 {sha256.hexdigest()[:12]}… instead of {entry.sha256[:12]}…"
    return None


def fetched(
    files: Files, place: str, expected: tuple[FileEntry, ...], cache: Path, key: str, ignore: tuple[str, ...] = ()
) -> Path:
    """`cache/key`, a folder with just these files, every byte checked; what the cache already holds is not fetched
    again. Copies that nobody uses make room for it. `ignore`: files of the store that are no payload. Raises
    DamagedError naming what is wrong in the store."""
    target = cache / key
    needed = sum(entry.size for entry in expected)
    use(cache, Copy(key, needed))
    with reported("read the cache in", target):
        if target.exists() and not check_folder(target, expected):
            return target
    found = {path: stored.size for path, stored in files.tree(place).items() if path not in ignore}
    _raise_if_any(differences(found, expected), f"{files.url}/{place}")
    make_room(cache)
    with reported("fetch into", target, needed=needed):
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_after_dead(cache, key)
        building = aside(cache, key)
        try:
            _download(files, place, expected, building)
            _put_in_place(building, target, expected, aside(cache, key))
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return target


def _download(files: Files, place: str, expected: tuple[FileEntry, ...], building: Path) -> None:
    def download(entry: FileEntry) -> str | None:
        path = building / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        problem: str | None = None
        # a wrong byte may have come about on the way: what is wrong twice is wrong in the store
        for _ in range(2):
            with open(path, "wb") as stream:
                problem = _problem(files, place, entry, stream.write)
            if problem is None:
                os.chmod(path, READ_ONLY)
                return None
        return problem

    problems = [problem for problem in in_parallel(download, expected, THREADS) if problem is not None]
    _raise_if_any(problems, f"{files.url}/{place}")


def _raise_if_any(problems: list[str], where: str) -> None:
    if problems:
        raise DamagedError(f"{where} is damaged: {'; '.join(problems[:5])}; run again: what made it will be done again")


def _put_in_place(building: Path, target: Path, expected: tuple[FileEntry, ...], away: Path) -> None:
    """The cache is checked at every use, so it needs no fsync; another process may fetch the same."""
    for _ in range(3):
        try:
            os.rename(building, target)
            return
        except OSError:
            if target.exists() and not check_folder(target, expected):
                return
            try:
                os.rename(target, away)
            except FileNotFoundError:
                continue
            shutil.rmtree(away, ignore_errors=True)
    raise MissingError(f"{target} is being changed by others all the time; choose another POSTTRAIN_CACHE")
