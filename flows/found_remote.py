"""What lies at URLs that a person names: s3://bucket/folder, https://host/file, whatever fsspec reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from artifacts.errors import RequestError


def shown(url: str) -> str:
    """Without the query: signed URLs hold keys in it."""
    return url.split("?")[0]


class Fetched:
    """Files at URLs: listed once, read where they are, and fetched into `folder` where they have to be local."""

    def __init__(self, urls: Sequence[str], folder: Path) -> None:
        self.urls, self._folder = urls, folder
        self._copies: dict[tuple[int, str], Path] = {}

    def places(self, suffix: str | None) -> Iterator[str]:
        """URLs of the files that end so; of None, what folders or several files may be: each URL, and folders below.

        Raises RequestError where nothing is, or nothing can be listed.
        """
        for url in self.urls:
            files = [file for _, file in _files(url)]
            if suffix is not None:
                yield from (file for file in files if shown(file).endswith(suffix))
            else:
                yield url
                yield from sorted({file.rpartition("/")[0] for file in files} - {url.rstrip("/")})

    def folders(self, suffix: str = "") -> list[Path]:
        """A local folder for each URL, with its files that end so. Raises RequestError as `places` does."""
        for number, url in enumerate(self.urls):
            if (number, suffix) not in self._copies:
                copy = self._folder / f"{number}{suffix}"
                _fetch(url, copy, suffix)
                self._copies[number, suffix] = copy
        return [self._copies[number, suffix] for number in range(len(self.urls))]


def _files(url: str) -> list[tuple[str, str]]:
    """Relative name and URL of each file; of a file, its own."""
    filesystem, path = _opened(url)
    try:
        if filesystem.isfile(path):
            return [(PurePosixPath(shown(path)).name, url)]
        below = sorted(filesystem.find(path))
    except Exception as error:  # every file system has errors of its own
        raise RequestError(f"--files {shown(url)}: cannot list it: {type(error).__name__}: {error}") from error
    if not below:
        raise RequestError(f"--files {shown(url)}: there is no file; name a file, or a folder with some")
    return [(file.removeprefix(path).lstrip("/"), str(filesystem.unstrip_protocol(file))) for file in below]


def _fetch(url: str, folder: Path, suffix: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in _files(url):
        if not name.endswith(suffix):
            continue
        place = folder / name
        if not place.resolve().is_relative_to(folder.resolve()):
            raise RequestError(f"--files {shown(url)}: {name!r} leads out of its folder")
        place.parent.mkdir(parents=True, exist_ok=True)
        filesystem, path = _opened(file)
        try:
            filesystem.get_file(path, str(place))
        except Exception as error:  # every file system has errors of its own
            raise RequestError(f"--files {shown(file)}: cannot read it: {type(error).__name__}: {error}") from error


def _opened(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except Exception as error:  # of a protocol that nobody knows, or whose package is not installed
        raise RequestError(f"--files {shown(url)}: {type(error).__name__}: {error}") from error
    return filesystem, str(path)
