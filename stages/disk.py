"""Whether there is room for what a stage is about to write."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from artifacts.errors import StageError


def require_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises StageError before work is begun whose result would not fit on the disk of `folder`."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise StageError(
            f"not enough disk for {what}: {_megabytes(needed_bytes)} needed, {_megabytes(free_bytes)} free at "
            f"{folder}; free some space or give another --store"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
