"""A lock between processes of one machine for an instant, kept by the kernel: it ends with its holder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from artifacts.local_errors import reported

PATIENCE_SECONDS = 10.0


@contextlib.contextmanager
def exclusively(path: Path, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Nobody else is between here and the end, but for one who stood still there for longer than the patience: the
    lock is of use only to leases, which bind nobody who does not answer."""
    descriptor = _acquired(path, patience_seconds)
    try:
        yield
    finally:
        os.close(descriptor)


def _acquired(path: Path, patience_seconds: float) -> int:
    deadline = time.monotonic() + patience_seconds
    while True:
        with reported("lock", path):
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            while not _try(descriptor):
                if time.monotonic() > deadline:
                    # its holder is stopped; the next to come make a new file
                    if is_at(descriptor, path):
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(path)
                    break
                time.sleep(0.005)
            else:
                if is_at(descriptor, path):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        deadline = max(deadline, time.monotonic() + patience_seconds)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the locked file is still the one that others will find."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
