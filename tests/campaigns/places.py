"""Stores that can be made to fail, one attempt after the other: behind a remote file system, and on a local disk."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from artifacts import Store
from artifacts.local import LocalFiles
from artifacts.memory import locked_memory
from artifacts.remote import RemoteFiles
from artifacts.retry import Patience
from tests.campaigns.disk_faults import FaultyDisk
from tests.campaigns.interposed import Decide, Interposed


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def patience(self) -> Patience:
        return Patience(deadline=60, sleep=self.sleep, clock=lambda: self.now)


@dataclass
class Remote:
    """A store in memory. `calls`: how many the last faulty attempt made; `met`: how many of them failed."""

    folder: Path
    number: int = 0
    calls: int = 0
    met: int = 0
    kept: dict[str, bytes] = field(default_factory=dict)

    def healthy(self) -> Store:
        return self._store(locked_memory, Patience())

    @contextlib.contextmanager
    def faulty(self, decide: Decide) -> Iterator[Store]:
        fs = Interposed(locked_memory(), decide)
        yield self._store(lambda: fs, Clock().patience())
        self.calls, self.met = fs.calls, fs.met

    def _store(self, make: Callable[[], Any], patience: Patience) -> Store:
        return Store(RemoteFiles(f"memory:/{self._base}", self._base, make, patience), self.folder / "cache")

    @property
    def _base(self) -> str:
        return f"/{self.folder.name}-{self.number}"

    def clear(self) -> None:
        """The next attempt meets an empty store."""
        with contextlib.suppress(FileNotFoundError):
            locked_memory().rm(self._base, recursive=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.number += 1

    def keep(self) -> None:
        """What the store and its cache hold now is what `bring_back` brings."""
        fs = locked_memory()
        self.kept = {path.removeprefix(self._base): fs.cat_file(path) for path in fs.find(self._base)}
        _copy(self.folder, self.folder.with_suffix(".kept"))

    def bring_back(self) -> None:
        """After `clear`."""
        fs = locked_memory()
        for path, data in self.kept.items():
            fs.pipe_file(self._base + path, data)
        _copy(self.folder.with_suffix(".kept"), self.folder)


@dataclass
class Local:
    """A store on a local disk."""

    folder: Path
    calls: int = 0
    met: int = 0

    def healthy(self) -> Store:
        return Store(LocalFiles(self.folder / "store"), self.folder / "cache")

    @contextlib.contextmanager
    def faulty(self, decide: Decide) -> Iterator[Store]:
        disk = FaultyDisk(decide)
        files = LocalFiles(self.folder / "store")
        files._disk = disk
        yield Store(files, self.folder / "cache")
        self.calls, self.met = disk.calls, disk.met

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def keep(self) -> None:
        _copy(self.folder, self.folder.with_suffix(".kept"))

    def bring_back(self) -> None:
        _copy(self.folder.with_suffix(".kept"), self.folder)


def _copy(folder: Path, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    if folder.exists():
        shutil.copytree(folder, to)


Place = Remote | Local
