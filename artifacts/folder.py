"""A local folder as a set of files: what is in it, and whether it is what a manifest says."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from artifacts.digest import FileEntry, collisions, path_problem
from artifacts.errors import StoreError
from artifacts.shapes import shown

T = TypeVar("T")
R = TypeVar("R")
THREADS = min(8, os.cpu_count() or 1)


def in_parallel(function: Callable[[T], R], items: Iterable[T], threads: int = THREADS) -> list[R]:
    """`function` of every item, in threads, results in order; the first error is raised."""
    work = list(items)
    if len(work) < 2 or threads < 2:
        return [function(item) for item in work]
    with ThreadPoolExecutor(min(threads, len(work))) as pool:
        return list(pool.map(function, work))


def scan(folder: Path, busy: bool = False) -> dict[str, os.stat_result]:
    """Relative path -> lstat of everything below a folder that is not a folder, links and pipes included. `busy`:
    others work there, and what they take away meanwhile is not there; else it is an OSError."""
    found: dict[str, os.stat_result] = {}
    passing = (FileNotFoundError, NotADirectoryError) if busy else ()
    # no recursion: whoever made the folder chose its depth
    folders = [""]
    while folders:
        prefix = folders.pop()
        with contextlib.suppress(*passing), os.scandir(folder / prefix if prefix else folder) as items:
            for item in sorted(items, key=lambda entry: entry.name):
                if item.is_dir(follow_symlinks=False):
                    folders.append(f"{prefix}{item.name}/")
                    continue
                with contextlib.suppress(*passing):
                    found[prefix + item.name] = item.stat(follow_symlinks=False)
    return found


def payload(folder: Path) -> list[str]:
    """The files to store from a folder, sorted. Raises StoreError that names what may not be stored."""
    try:
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            raise StoreError(f"cannot store {folder}: not a folder")
        found = scan(folder)
    except OSError as error:
        raise StoreError(f"cannot store {folder}: {error.strerror}") from None
    problems = []
    for path, status in found.items():
        reason = path_problem(path)
        if not stat.S_ISREG(status.st_mode):
            problems.append(f"{path}: not a regular file")
        elif path.rsplit("/", 1)[-1].startswith(".tmp"):
            problems.append(f"{path}: a left-over of an interrupted write")
        elif reason is not None:
            problems.append(f"{path!r}: {reason}")
    problems += collisions(found)
    if not found:
        problems.append("no file in it")
    if problems:
        raise StoreError(f"cannot store {folder}: {'; '.join(problems[:5])}")
    return sorted(found)


def hash_file(path: Path, relative: str, before: Callable[[int], None] | None = None) -> FileEntry:
    """The entry of one regular file, streamed; `before(descriptor)` runs first (the local store's fsync).
    Raises OSError, also for a link, and StoreError if the file changes meanwhile."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(f"{path} is not a regular file")
        if before is not None:
            before(descriptor)
        entry = FileEntry(relative, status.st_size, hashlib.file_digest(stream, "sha256").hexdigest())
        after = os.fstat(descriptor)
    if (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        raise StoreError(f"{path} is being written while it is read; wait for its writer")
    return entry


def hash_folder(folder: Path, before: Callable[[int], None] | None = None) -> tuple[FileEntry, ...]:
    """The files of a folder with sizes and digests, hashed in parallel, sorted. Raises StoreError."""
    try:
        return tuple(in_parallel(lambda path: hash_file(folder / path, path, before), payload(folder)))
    except OSError as error:
        raise StoreError(f"cannot read {error.filename or folder}: {error.strerror}") from None


def differences(found: dict[str, int], expected: Iterable[FileEntry]) -> list[str]:
    """Where a listing (path -> size, -1 for no regular file) is not what was expected, one line each."""
    problems = []
    wanted = {entry.path: entry.size for entry in expected}
    for path, size in wanted.items():
        if path not in found:
            problems.append(f"{path}: missing")
        elif found[path] != size:
            what = f"{found[path]} bytes instead of {size}" if found[path] >= 0 else "not a regular file"
            problems.append(f"{path}: {what}")
    return problems + [f"{shown(path)}: does not belong there" for path in sorted(set(found) - set(wanted))]


def check_folder(folder: Path, expected: tuple[FileEntry, ...], ignore: tuple[str, ...] = ()) -> list[str]:
    """What in a folder is not as expected, by content; one line a file. Empty: every byte is right."""
    try:
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            return [f"{folder.name}: not a folder"]
        found = {path: sizes(status) for path, status in scan(folder).items() if path not in ignore}
    except FileNotFoundError:
        found = {}
    problems = differences(found, expected)
    if problems:
        return problems

    def check(entry: FileEntry) -> str | None:
        try:
            actual = hash_file(folder / entry.path, entry.path)
        except FileNotFoundError:
            return f"{entry.path}: missing"
        if actual.sha256 != entry.sha256:
            return f"{entry.path}: sha256 {actual.sha256[:12]}… instead of {entry.sha256[:12]}…"
        return None

    return [problem for problem in in_parallel(check, expected) if problem is not None]


def sizes(status: os.stat_result) -> int:
    """Size of a regular file in bytes, -1 for anything else."""
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
