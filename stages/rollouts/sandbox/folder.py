"""The folder of one program: emptied whatever is in it, and watched where nothing else bounds it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from stages.rollouts.sandbox.limits import MEGABYTE, Limits

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def empty(folder: Path) -> None:
    """Remove all that a folder holds: follows no link, and no depth and no mode stops it. Raises OSError."""
    here = os.open(folder, DIRECTORY)
    try:
        below: list[str] = []
        while True:
            if (name := _clear(here)) is not None:
                os.chmod(name, stat.S_IRWXU, dir_fd=here)
                here = _step(here, name)
                below.append(name)
            elif below:
                here = _step(here, "..")
                os.rmdir(below.pop(), dir_fd=here)
            else:
                return
    finally:
        os.close(here)


def _clear(here: int) -> str | None:
    """Remove what can be removed at once; a folder that is not empty, if there is one."""
    full = None
    with os.scandir(here) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=here)
                continue
            try:
                os.rmdir(entry.name, dir_fd=here)
            except OSError:
                full = entry.name
    return full


def _step(here: int, name: str) -> int:
    there = os.open(name, DIRECTORY, dir_fd=here)
    os.close(here)
    return there


def too_full(folder: Path, limits: Limits) -> bool:
    """More entries or bytes in a folder than allowed. Looks at no more entries than that.

    A folder that cannot be looked into, because its path is too long or its mode forbids it, counts as too full.
    """
    count = size = 0
    waiting = [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    count += 1
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    else:
                        size += entry.stat(follow_symlinks=False).st_size
                    if count > limits.folder_files or size > limits.folder_mb * MEGABYTE:
                        return True
        except FileNotFoundError:
            continue  # it has just been removed
        except OSError:
            return True
    return False
