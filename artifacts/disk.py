"""The primitives by which the local store changes a disk. Everything goes through them, so that a test can
record them and enumerate what a power cut may leave, or die between any two."""

from __future__ import annotations

import os
from pathlib import Path

from artifacts.owner import owner_tag

READ_ONLY = 0o444
UNSYNCED = "POSTTRAIN_TEST_NO_FSYNC"
"""Environment variable that turns fsync off. For tests only: a power cut then loses artifacts."""


class Disk:
    """Each method is one step on disk. An fsync that fails is never repeated on the same file: the kernel has
    dropped the data and would report success."""

    def mkdir(self, path: Path) -> None:
        """Raises FileExistsError."""
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """A new file, opened for writing; returns its descriptor."""
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)

    def write(self, descriptor: int, data: bytes) -> None:
        """Appends all of `data`."""
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]

    def fsync(self, descriptor: int) -> None:
        """Content of one file to the disk."""
        if not os.environ.get(UNSYNCED):
            os.fsync(descriptor)

    def fsync_folder(self, path: Path) -> None:
        """Names in one folder to the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Replaces a file; a folder only where there is none or an empty one."""
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        os.unlink(path)


def temporary_name() -> str:
    """A name that says whose it is, so that it can be cleared away when its owner is dead."""
    return f"{owner_tag()}-{os.urandom(6).hex()}"
