"""What runs leave on this machine: the folders in which their stages ran, <run>/<stage> in the scratch folder of their
store, and pages of them, <run>.html or <run>.sweep.html, that somebody gives out."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from artifacts.folder import scan
from artifacts.local_errors import reported


def scratch_of(cache: Path, place: str) -> Path:
    """Where the runs of a store that is not of this machine work: no other store's, so that whoever clears one store
    away meets no run of another. `place`: what tells the store from every other."""
    words = re.sub(r"[^A-Za-z0-9._]+", "-", place)[:60].strip("-.")
    return cache / "scratch" / f"{words}-{hashlib.sha256(place.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class JobFolder:
    """What one run left. `written`: when its youngest file was, by the clock of that disk."""

    name: str
    size: int
    written: float


def job_folder(path: Path) -> JobFolder:
    """Raises OSError where it is gone; its run may be at work in it."""
    found = scan(path, busy=True).values()
    written = max((status.st_mtime for status in found), default=os.stat(path).st_mtime)
    return JobFolder(path.name, sum(status.st_size for status in found), written)


def job_folders(scratch: Path) -> tuple[float, list[JobFolder]]:
    """(now, every run's folder), both times by the clock of that disk."""
    if not scratch.is_dir():
        return 0.0, []
    with reported("list", scratch):
        now = _now(scratch)
        found = []
        for path in sorted(path for path in scratch.iterdir() if path.is_dir() and not path.is_symlink()):
            with contextlib.suppress(FileNotFoundError):  # another one clears it away
                found.append(job_folder(path))
        return now, found


def last_sign(folder: Path) -> float | None:
    """When what runs in a run's folder wrote something last; None: it is not on this machine."""
    try:
        return job_folder(folder).written
    except OSError:  # not there, or being deleted
        return None


def run_pages(folder: Path, runs: Iterable[str]) -> tuple[float, list[tuple[str, Path]]]:
    """(now by the clock of that disk, these runs with their pages); those of other stores' runs are nothing of ours."""
    if not folder.is_dir():
        return 0.0, []
    with reported("list", folder):
        known = {name: run for run in runs for name in (f"{run}.html", f"{run}.sweep.html")}
        paths = [path for path in sorted(folder.iterdir()) if path.name in known and path.is_file()]
        return _now(folder), [(known[path.name], path) for path in paths]


def _now(folder: Path) -> float:
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime
