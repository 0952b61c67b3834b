"""The private folder in which a publication is put together, and how it becomes visible from there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from pathlib import Path

from artifacts import durable
from artifacts.digest import FileEntry
from artifacts.disk import READ_ONLY, Disk
from artifacts.errors import StoreError
from artifacts.files import Publication
from artifacts.folder import in_parallel, scan

PIECE = 8 * 2**20


class Gathered:
    """Fills `folder` with the files of a publication and its marker, all on disk before `fill` returns."""

    def __init__(self, disk: Disk, folder: Path) -> None:
        self.folder = folder
        self._disk = disk
        self._moved: list[tuple[Path, Path]] = []

    def fill(self, publication: Publication) -> None:
        """Moves files of the same disk, which cost nothing; copies the others and those that have a second
        name, through which somebody could change them later. Sources were synced when they were hashed."""
        places = {entry.path: self.folder / publication.place(entry) for entry in publication.entries}
        folders = self._make_folders(set(places.values()))
        copies = []
        device = os.stat(self.folder).st_dev
        for entry in publication.entries:
            source, place = publication.folder / entry.path, places[entry.path]
            status = os.lstat(source)
            if status.st_dev != device or status.st_nlink > 1:
                copies.append((entry, source, place))
                continue
            if status.st_size != entry.size:
                raise StoreError(f"{source} changed while it was stored; wait for its writer")
            os.chmod(source, READ_ONLY)
            try:
                self._disk.rename(source, place)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                copies.append((entry, source, place))
                continue
            self._moved.append((source, place))
        in_parallel(lambda copy: self._copy(*copy), copies)
        name, data = publication.marker
        durable.write_new(self._disk, self.folder / name, data)
        for path in sorted(folders, reverse=True):
            self._disk.fsync_folder(path)

    def appear_at(self, target: Path, publication: Publication) -> None:
        """One rename makes all of it visible; where something lies already, file by file."""
        try:
            self._disk.rename(self.folder, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            self._merge_into(target, publication)

    def _merge_into(self, target: Path, publication: Publication) -> None:
        """Another writer was here, or what is here is damaged: same names, same contents, so each file is
        replaced on its own, marker last. Nobody sees a state that is worse than before."""
        wanted = {publication.place(entry) for entry in publication.entries}
        for path in publication.foreign(scan(target)):
            self._disk.unlink(target / path)
        for place in sorted(wanted):
            durable.ensure_plain_folder(self._disk, target, (target / place).parent)
            if (target / place).is_dir():
                shutil.rmtree(target / place)
            self._disk.rename(self.folder / place, target / place)
        for folder in sorted({(target / place).parent for place in wanted}):
            durable.sync_upwards(self._disk, folder, target)
        self._disk.rename(self.folder / publication.marker[0], target / publication.marker[0])
        self._disk.fsync_folder(target)

    def undo(self) -> None:
        """Gives moved files back and leaves nothing."""
        for source, place in self._moved:
            with contextlib.suppress(OSError):
                os.rename(place, source)
        self.discard()

    def discard(self) -> None:
        """Removes what is left of the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_folders(self, places: set[Path]) -> set[Path]:
        folders = {self.folder}
        for place in places:
            parent = place.parent
            while parent not in folders:
                folders.add(parent)
                parent = parent.parent
        for path in sorted(folders):
            self._disk.mkdir(path)
        return folders

    def _copy(self, entry: FileEntry, source: Path, place: Path) -> None:
        sha256 = hashlib.sha256()
        descriptor = self._disk.create(place)
        try:
            with open(source, "rb", buffering=0) as stream:
                while piece := stream.read(PIECE):
                    sha256.update(piece)
                    self._disk.write(descriptor, piece)
            self._disk.fsync(descriptor)
            os.fchmod(descriptor, READ_ONLY)
        finally:
            os.close(descriptor)
        if sha256.hexdigest() != entry.sha256:
            raise StoreError(f"{source} changed while it was stored; wait for its writer")
