"""Source files on any fsspec file system, as local files with their SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from artifacts.errors import DataError
from stages.data.unpacking import packing_of
from stages.names import closest, nearest

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
"""Extension -> format; what stands after it of `PACKINGS` is unpacked on the way."""

_CHUNK_BYTES = 1 << 20
_SAVED_FILES = ({"dataset_dict.json"}, {"dataset_info.json", "state.json"})


@dataclass(frozen=True)
class SourceFile:
    """One file of a source. `shown`: for messages. `name`: relative to the folder or glob, for artifacts."""

    filesystem: Any
    path: str
    shown: str
    name: str

    @property
    def suffix(self) -> str:
        """`.jsonl` of `train.jsonl.gz`."""
        return PurePosixPath(self.path.removesuffix(self.packing)).suffix.lower()

    @property
    def packing(self) -> str:
        """`.gz` of `train.jsonl.gz`; empty where it is not compressed."""
        return packing_of(self.path)


@dataclass(frozen=True)
class Located:
    """What a path leads to: files to read, or one folder that `datasets.save_to_disk` wrote."""

    files: tuple[SourceFile, ...] = ()
    ignored: tuple[str, ...] = ()
    """Names of files in the folder that hold no rows (by their extension)."""
    saved: SourceFile | None = None


def locate(url: str, wanted: str) -> Located:
    """The files of `url`, in the order of their names; `wanted`: a format, or `auto`.

    Raises DataError when there is nothing, naming the nearest file that is there.
    """
    import fsspec

    shown = url.split("?")[0]  # signed URLs hold keys in their query
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        filesystem.invalidate_cache()  # files as they are, not as they were when this process listed them before
        if any(sign in path for sign in "*?[") and not filesystem.exists(path):
            found = sorted(entry for entry in filesystem.glob(path) if filesystem.isfile(entry))
            if not found:
                raise DataError(f"no file matches {shown}")
            return Located(tuple(_named(filesystem, found, _fixed_part(path))))
        if filesystem.isfile(path):
            return Located((SourceFile(filesystem, path, shown, PurePosixPath(path).name),))
        if not filesystem.isdir(path):
            raise DataError(f"no file or folder {shown}{_nearest_file(filesystem, path)}")
        entries = sorted(filesystem.find(path))
    except DataError:
        raise
    except Exception as error:  # every file system has errors of its own
        raise DataError(f"cannot read {shown}: {type(error).__name__}: {error}") from error
    return _folder(filesystem, path, entries, shown, wanted)


def _folder(filesystem: Any, path: str, entries: list[str], shown: str, wanted: str) -> Located:
    names = {PurePosixPath(entry).name for entry in entries if PurePosixPath(entry).parent == PurePosixPath(path)}
    if wanted == "saved" or (wanted == "auto" and any(files <= names for files in _SAVED_FILES)):
        return Located(saved=SourceFile(filesystem, path, shown, PurePosixPath(path).name))
    files: list[SourceFile] = []
    ignored: list[SourceFile] = []
    for file in _named(filesystem, entries, path):
        known = FORMATS.get(file.suffix)
        visible = not any(part.startswith(".") for part in PurePosixPath(file.name).parts)
        takes = known is not None and (wanted in ("auto", known) or {wanted, known} == {"json", "jsonl"})
        (files if visible and takes else ignored).append(file)
    if not files:
        raise DataError(
            f"the folder {shown} has no file of rows ({', '.join(FORMATS)}); found: "
            f"{', '.join(file.name for file in ignored[:10]) or 'nothing'}"
        )
    return Located(tuple(files), tuple(file.name for file in ignored))


def files_below(folder: SourceFile) -> list[SourceFile]:
    """All files of a folder, in the order of their paths, part by part."""
    found = _named(folder.filesystem, folder.filesystem.find(folder.path), folder.path)
    return sorted(found, key=lambda file: PurePosixPath(file.name))


def _named(filesystem: Any, paths: list[str], root: str) -> Iterator[SourceFile]:
    for path in paths:
        name = path.removeprefix(root).lstrip("/")
        yield SourceFile(filesystem, path, _shown(filesystem, path), name)


def _shown(filesystem: Any, path: str) -> str:
    return path if is_local(filesystem) else str(filesystem.unstrip_protocol(path))


def is_local(filesystem: Any) -> bool:
    """Whether its paths are those of this machine."""
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


def _fixed_part(pattern: str) -> str:
    """The folder before the first wildcard."""
    first = min(pattern.index(sign) for sign in "*?[" if sign in pattern)
    return pattern[: pattern.rfind("/", 0, first) + 1]


def _nearest_file(filesystem: Any, path: str) -> str:
    parent, name = str(PurePosixPath(path).parent), PurePosixPath(path).name
    if not filesystem.isdir(parent):
        return f"; the folder {parent} does not exist"
    names = [PurePosixPath(entry).name for entry in filesystem.ls(parent, detail=False)]
    beside = [other for other in names if PurePosixPath(other.removesuffix(packing_of(other))).suffix in ("", *FORMATS)]
    # without what all files of rows end with, which makes any two of them alike
    close = closest(_stem(name), filter(None, map(_stem, beside)))
    same = [other for other in beside if _stem(other) == close]
    return nearest(name, same) or (f"; did you mean {same[0]!r}?" if same else "")


def _stem(name: str) -> str:
    """`train` of `train.jsonl.gz`."""
    return name.partition(".")[0]


@contextmanager
def local_copy(file: SourceFile, scratch: Path) -> Iterator[tuple[Path, str, int]]:
    """(path, SHA-256 in hex, bytes) of the file here; what was fetched is removed afterwards."""
    local = is_local(file.filesystem)
    target = Path(file.path) if local else scratch / f"fetched-{hashlib.sha256(file.path.encode()).hexdigest()[:16]}"
    digest, size = hashlib.sha256(), 0
    try:
        with file.filesystem.open(file.path, "rb") as stream, open(target, "rb" if local else "wb") as copy:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                if not local:
                    copy.write(chunk)
    except Exception as error:  # every file system has errors of its own
        raise DataError(f"cannot read {file.shown}: {type(error).__name__}: {error}") from error
    try:
        yield target, digest.hexdigest(), size
    finally:
        if not local:
            target.unlink()
