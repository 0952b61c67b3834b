"""A lock between processes of one machine for an instant, kept by the kernel: it ends with its holder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from artifacts.errors import StoreError
from artifacts.local_errors import reported

PATIENCE_SECONDS = 10.0


@contextlib.contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Nobody else is between here and the end. Raises StoreError if somebody stays there for long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    with reported("lock", path):
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"cannot lock {path} within {PATIENCE_SECONDS:.0f} s: a stopped process holds it; "
                        "continue or end it"
                    ) from None
                time.sleep(0.005)
        yield
    finally:
        os.close(descriptor)
