"""Checkpoints of unfinished work: a new folder each time, its marker last, the newest valid one counts."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from artifacts.checkpoint_marker import DONE, NAME, PART, marked_files, marker_bytes, new_name, part_name, step_of
from artifacts.digest import FileEntry, is_sha256, sha256_bytes
from artifacts.errors import DamagedError, RequestError, StoreError
from artifacts.files import Files, Publication, Stored
from artifacts.folder import check_folder, differences
from artifacts.materialize import fetched, problems_of
from artifacts.reading import read_hashed, read_sealed
from artifacts.sealed import unseal

logger = logging.getLogger(__name__)
ABANDONED_SECONDS = 3600.0
"""An unfinished checkpoint this old has no writer any more."""
_SECONDS_BETWEEN_LOOKS = 0.2


def _pause() -> None:
    time.sleep(_SECONDS_BETWEEN_LOOKS)


@dataclass(frozen=True)
class _Saved:
    name: str
    step: int
    files: tuple[FileEntry, ...]


class Checkpoints:
    """The checkpoints of one fingerprint, usable from any machine and any run."""

    def __init__(self, files: Files, fingerprint: str, keep: int, cache: Path) -> None:
        if not is_sha256(fingerprint) or keep < 1:
            raise RequestError(f"not a fingerprint (64 hex digits) or keep < 1: {fingerprint!r}, {keep}")
        self._files = files
        self._key = f"work/{fingerprint}/checkpoints"
        self._keep = keep
        self._cache = cache
        self._damaged: set[str] = set()

    def save(self, step: int, folder: Path) -> None:
        """Stores the files of `folder` as the state after `step` steps; durable on return. A local store
        takes the files away. Then all but the newest valid checkpoints are deleted."""
        entries = self._taken_in(folder, DONE)
        marker = (DONE, marker_bytes(step, entries))
        self._files.publish(Publication(folder, entries, f"{self._key}/{new_name(step)}", "", marker))
        self._prune()

    def new_name(self, step: int) -> str:
        """The name of a checkpoint that several processes are going to save together."""
        return new_name(step)

    def save_part(self, name: str, part: int, folder: Path) -> None:
        """Stores the files of `folder` as one process's part; durable on return, and not counted until `finish`."""
        entries = self._taken_in(folder, PART)
        marker = (PART, marker_bytes(step_of(name), entries))
        self._files.publish(Publication(folder, entries, f"{self._key}/{name}/{part_name(part)}", "", marker))

    def finish(self, name: str, parts: int, pause: Callable[[], None] = _pause) -> None:
        """Waits (`pause`, again and again) until so many parts are durable, then makes the checkpoint count."""
        entries: list[FileEntry] = []
        for part in range(parts):
            while (found := self._part_entries(name, part_name(part))) is None:
                pause()
            entries += found
        self._files.write(f"{self._key}/{name}/{DONE}", marker_bytes(step_of(name), entries))
        self._prune()

    def open(self, name: str) -> Path:
        """The local folder of a checkpoint whose name another process has from `latest`. A local store's own
        folder has just been checked there; a copy of this machine is checked here, byte by byte."""
        if self._files.local_root is not None:
            return self._files.local_root / f"{self._key}/{name}"
        saved = self._read(name)
        if saved is None:
            raise DamagedError(f"{self._files.url}/{self._key}/{name} has no {DONE}")
        return self._localized(saved)

    def latest(self) -> tuple[int, Path] | None:
        """(step, local folder) of the newest checkpoint whose every byte is right, or None. On a local store
        the folder is the store's own: read it, do not write there. Damaged ones are named in the log."""
        for name in self._names():
            try:
                saved = self._read(name)
                if saved is not None:
                    return saved.step, self._localized(saved)
            except DamagedError as error:
                self._damaged.add(name)
                logger.warning("checkpoint %s is damaged and left out: %s", name, error)
        return None

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint that looks whole by its marker and sizes; no content is read."""
        for name in self._names():
            if self._looks_whole(name, self._files.tree(f"{self._key}/{name}")):
                return step_of(name)
        return None

    def newest_file(self, name: str, most: int) -> tuple[int, bytes] | None:
        """(step, content) of the file so named, of `most` bytes or less, in the newest finished checkpoint where it is
        right; nothing else is read. None: none has it."""
        for checkpoint in self._names():
            with contextlib.suppress(DamagedError, FileNotFoundError):
                saved = self._read(checkpoint)
                for entry in () if saved is None else saved.files:
                    if entry.path.rpartition("/")[2] == name and entry.size <= most:
                        data = read_hashed(self._files, f"{self._key}/{checkpoint}/{entry.path}", entry.sha256, most)
                        if data is not None:
                            return step_of(checkpoint), data
        return None

    def verify(self) -> dict[str, list[str]]:
        """Finished checkpoint -> what of it is not as it was written, by content."""
        found = {}
        for name in self._names():
            try:
                saved = self._read(name)
            except DamagedError as error:
                found[name] = [str(error)]
                continue
            if saved is not None:
                found[name] = problems_of(self._files, f"{self._key}/{name}", "", saved.files, (DONE,))
        return found

    def clear(self) -> None:
        """Deletes all of them."""
        for name in self._names():
            self._files.remove(f"{self._key}/{name}", first=DONE)
        self._files.remove(self._key)

    def _taken_in(self, folder: Path, marker: str) -> tuple[FileEntry, ...]:
        entries = self._files.take_in(folder)
        if any(entry.path == marker for entry in entries):
            raise StoreError(f"cannot store {folder} as a checkpoint: {marker} is the name of its marker")
        return entries

    def _part_entries(self, name: str, part: str) -> list[FileEntry] | None:
        """The files of a part with its marker, relative to the checkpoint; None: it is not durable yet."""
        key = f"{self._key}/{name}/{part}/{PART}"
        try:
            data = read_sealed(self._files, key)
        except FileNotFoundError:
            return None
        files = marked_files(unseal(data, f"{self._files.url}/{key}"), f"{self._files.url}/{key}")
        marker = FileEntry(f"{part}/{PART}", len(data), sha256_bytes(data))
        return [marker, *(FileEntry(f"{part}/{entry.path}", entry.size, entry.sha256) for entry in files)]

    def _names(self) -> list[str]:
        """Names of checkpoint folders, finished or not, newest first."""
        return sorted((name for name in self._files.children(self._key) if NAME.fullmatch(name)), reverse=True)

    def _read(self, name: str) -> _Saved | None:
        """What a checkpoint holds; None: it is not finished. Raises DamagedError."""
        key = f"{self._key}/{name}/{DONE}"
        try:
            data = read_sealed(self._files, key)
        except FileNotFoundError:
            return None
        value = unseal(data, f"{self._files.url}/{key}")
        files = marked_files(value, f"{self._files.url}/{key}")
        if value.get("step") != step_of(name):
            raise DamagedError(f"{self._files.url}/{key} is the marker of another folder")
        return _Saved(name, step_of(name), files)

    def _localized(self, saved: _Saved) -> Path:
        key = f"{self._key}/{saved.name}"
        if self._files.local_root is None:
            return fetched(self._files, key, saved.files, self._cache, key, ignore=(DONE,))
        folder = self._files.local_root / key
        problems = check_folder(folder, saved.files, ignore=(DONE,))
        if problems:
            raise DamagedError("; ".join(problems[:3]))
        return folder

    def _looks_whole(self, name: str, found: dict[str, Stored]) -> bool:
        try:
            saved = self._read(name) if DONE in found else None
        except DamagedError:
            return False
        if saved is None or name in self._damaged:
            return False
        return not differences({p: s.size for p, s in found.items() if p != DONE}, saved.files)

    def _prune(self) -> None:
        whole = 0
        for name in self._names():
            found = self._files.tree(f"{self._key}/{name}")
            if whole >= self._keep:
                useless = DONE in found or self._abandoned(name, found)
            else:
                looks_whole = self._looks_whole(name, found)
                whole += looks_whole
                useless = not looks_whole and (name in self._damaged or self._abandoned(name, found))
            if useless:
                self._files.remove(f"{self._key}/{name}", first=DONE)

    def _abandoned(self, name: str, found: dict[str, Stored]) -> bool:
        """An unfinished one that nobody writes to any more, by the store's clock."""
        if not found or DONE in found:
            return False
        newest = max(found, key=lambda path: found[path].modified)
        age = self._files.age(f"{self._key}/{name}/{newest}")
        return age is not None and age > ABANDONED_SECONDS
