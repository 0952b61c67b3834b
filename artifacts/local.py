"""A store's files in a folder of this machine: every change is durable and seen as a whole or not at all.

Order of a publication: contents synced, moved into a private folder below `tmp/` together with the marker,
its folders synced, then one rename makes it visible, then the folders above are synced.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from artifacts import durable
from artifacts.digest import FileEntry
from artifacts.disk import Disk, temporary_name
from artifacts.errors import StoreError
from artifacts.files import Publication, Stored, swap_alone
from artifacts.folder import hash_folder, scan, sizes
from artifacts.gather import Gathered
from artifacts.local_errors import reported
from artifacts.locks import exclusively
from artifacts.no_links import is_folder, read_regular, require_no_links
from artifacts.owner import is_dead, lives_here
from artifacts.sealed import LARGEST_BYTES

PIECE = 16 * 2**20


class LocalFiles:
    """The Files protocol on a local folder."""

    def __init__(self, root: Path, disk: Disk | None = None, read_only: bool = False) -> None:
        self.root = root.absolute()
        self.url = str(self.root)
        self.local_root: Path | None = self.root
        self._disk = disk or Disk()
        with reported("open store", self.root, missing=read_only), contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.root):
                require_no_links(self.root, name)
        if read_only:
            return
        with reported("open store", self.root):
            durable.ensure_folder(self._disk, self.root / "tmp")
        self._sweep()

    @property
    def place(self) -> str:
        return self.url

    def path(self, key: str) -> Path:
        """Where a key lies. Raises DamagedError where the way there leads through a link."""
        assert key and not key.startswith("/") and ".." not in key.split("/"), key
        require_no_links(self.root, key, itself=False)
        return self.root / key

    def folder(self, key: str) -> Path:
        """`path` of a folder, which may not be a link itself."""
        require_no_links(self.root, key)
        return self.root / key

    def read(self, key: str, most: int = LARGEST_BYTES) -> bytes:
        with reported("read", self.path(key), missing=True):
            return read_regular(self.path(key), most)

    def write(self, key: str, data: bytes) -> None:
        path = self.path(key)
        with reported("write", path, needed=len(data)):
            temporary = self.root / "tmp" / temporary_name()
            try:
                durable.write_new(self._disk, temporary, data)
                durable.ensure_folder(self._disk, path.parent)
                self._disk.rename(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            durable.sync_upwards(self._disk, path.parent, self.root)

    def swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        with exclusively(self.root / "lock"):
            return swap_alone(self, key, expected, data)

    def touch(self, key: str) -> None:
        with reported("touch", self.path(key), missing=True):
            os.utime(self.path(key))

    def age(self, key: str) -> float | None:
        with reported("read the time of", self.path(key)):
            try:
                written = os.stat(self.path(key)).st_mtime
            except FileNotFoundError:
                return None
            return self._time() - written

    def now(self) -> float:
        return self._time()

    def _time(self) -> float:
        """What the disk writes down for a file of this instant."""
        clock = self.root / "tmp" / temporary_name()
        with reported("read the time in", clock):
            os.close(self._disk.create(clock))
            try:
                return os.stat(clock).st_mtime
            finally:
                os.unlink(clock)

    def children(self, key: str) -> list[str]:
        with reported("list", self.path(key)):
            try:
                return sorted(os.listdir(self.folder(key)))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def changed(self, key: str) -> dict[str, float]:
        found: dict[str, float] = {}
        with reported("list", self.path(key)):
            try:
                items = list(os.scandir(self.folder(key)))
            except (FileNotFoundError, NotADirectoryError):
                return {}
            for item in items:
                with contextlib.suppress(FileNotFoundError):
                    if item.is_dir(follow_symlinks=False):
                        found[item.name] = item.stat().st_mtime
        return found

    def tree(self, key: str) -> dict[str, Stored]:
        with reported("list", self.path(key)):
            for _ in range(5):
                try:
                    found = scan(self.folder(key))
                    return {path: Stored(sizes(status), status.st_mtime) for path, status in found.items()}
                except (FileNotFoundError, NotADirectoryError):
                    # deleted while it was listed, or never there
                    if not self.path(key).is_dir():
                        return {}
        raise StoreError(f"cannot list {self.path(key)}: it changes all the time; who writes there?")

    def take_in(self, folder: Path) -> tuple[FileEntry, ...]:
        def sync(descriptor: int) -> None:
            with reported("store", folder):
                self._disk.fsync(descriptor)

        return hash_folder(folder, before=sync)

    def publish(self, publication: Publication) -> None:
        target = self.folder(publication.key)
        needed = sum(entry.size for entry in publication.entries) + len(publication.marker[1])
        with reported("store", target, needed=needed):
            gathered = Gathered(self._disk, self.root / "tmp" / temporary_name())
            try:
                gathered.fill(publication)
                durable.ensure_folder(self._disk, target.parent)
                gathered.appear_at(target, publication)
            except BaseException:
                gathered.undo()
                raise
            durable.sync_upwards(self._disk, target.parent, self.root)
            gathered.discard()

    def stream(self, key: str, size: int) -> Iterator[bytes]:
        with reported("read", self.path(key), missing=True), open(self.path(key), "rb") as stream:
            while piece := stream.read(PIECE):
                yield piece

    def delete(self, key: str) -> None:
        with reported("delete", self.path(key)), contextlib.suppress(FileNotFoundError):
            self._disk.unlink(self.path(key))
            self._disk.fsync_folder(self.path(key).parent)

    def remove(self, key: str, first: str | None = None) -> None:
        path = self.folder(key)
        with reported("delete", path):
            try:
                if first is not None:
                    with contextlib.suppress(FileNotFoundError):
                        self._disk.unlink(path / first)
                    self._disk.fsync_folder(path)
                away = self.root / "tmp" / temporary_name()
                self._disk.rename(path, away)
            except FileNotFoundError:
                return
            # or a power cut could bring it back, with half of what is deleted next
            self._disk.fsync_folder(path.parent)
            shutil.rmtree(away)

    def unfinished(self) -> dict[str, Stored]:
        found = {}
        for name in self.children("tmp"):
            path = self.path(f"tmp/{name}")
            with contextlib.suppress(FileNotFoundError), reported("list", path, missing=True):
                if not lives_here(name):
                    parts = [os.lstat(path), *(scan(path).values() if is_folder(path) else ())]
                    size = sum(sizes(part) for part in parts if sizes(part) > 0)
                    found[f"tmp/{name}"] = Stored(size, max(part.st_mtime for part in parts))
        return found

    def abandon(self, name: str) -> None:
        path = self.path(name)
        with reported("delete", path), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path) if is_folder(path) else os.unlink(path)

    def _sweep(self) -> None:
        """Clears away what processes that died here left half-written."""
        for path in sorted((self.root / "tmp").iterdir()):
            if is_dead(path.name):
                with contextlib.suppress(OSError):
                    shutil.rmtree(path) if is_folder(path) else path.unlink()
