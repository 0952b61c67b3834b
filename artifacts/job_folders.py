"""The folders in which stages ran, on this machine: scratch/<run>/<stage>."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from artifacts.folder import scan
from artifacts.local_errors import reported


@dataclass(frozen=True)
class JobFolder:
    """What one run left. `written`: when its youngest file was, by the clock of that disk."""

    name: str
    size: int
    written: float


def job_folder(path: Path) -> JobFolder:
    """Raises OSError."""
    found = scan(path).values()
    written = max((status.st_mtime for status in found), default=os.stat(path).st_mtime)
    return JobFolder(path.name, sum(status.st_size for status in found), written)


def job_folders(scratch: Path) -> tuple[float, list[JobFolder]]:
    """(now, every run's folder), both times by the clock of that disk."""
    if not scratch.is_dir():
        return 0.0, []
    with reported("list", scratch):
        with tempfile.TemporaryFile(dir=scratch) as file:
            now = os.fstat(file.fileno()).st_mtime
        paths = sorted(path for path in scratch.iterdir() if path.is_dir() and not path.is_symlink())
        return now, [job_folder(path) for path in paths]
