"""What a local store does to a disk so that it is still there after a power cut: files and folders with their names."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from artifacts.disk import Disk


def write_new(disk: Disk, path: Path, data: bytes) -> None:
    """A new file with its content; its name is its folder's to sync."""
    descriptor = disk.create(path)
    try:
        disk.write(descriptor, data)
        disk.fsync(descriptor)
    finally:
        os.close(descriptor)


def ensure_folder(disk: Disk, folder: Path) -> None:
    """The folder and those above it, where they are missing."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            disk.mkdir(path)
        disk.fsync_folder(path.parent)


def ensure_plain_folder(disk: Disk, base: Path, folder: Path) -> None:
    """Folders from `base` down to `folder`; a link or a file in their place is taken away."""
    path = base
    for part in folder.relative_to(base).parts:
        path = path / part
        if path.is_symlink() or path.is_file():
            disk.unlink(path)
        with contextlib.suppress(FileExistsError):
            disk.mkdir(path)


def sync_upwards(disk: Disk, folder: Path, top: Path) -> None:
    """Syncs the names of `folder` and of everything above it up to `top`, also where another process made the folder:
    what this one acknowledges must not depend on that one's sync."""
    while True:
        disk.fsync_folder(folder)
        if folder in (top, folder.parent):
            return
        folder = folder.parent
