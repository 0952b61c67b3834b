"""A local store holds folders and regular files. Whoever else wrote there may have put links, which lead out of it,
pipes and devices, which never end, and files too large for memory in their place."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from artifacts.errors import DamagedError

_NO_FILE = (errno.ELOOP, errno.ENXIO)
"""What opening a link and a socket gives."""


def require_no_links(root: Path, key: str, itself: bool = True) -> None:
    """Raises DamagedError where a folder on the way from `root` to a key is a link, or the key itself."""
    # every access to a store comes here: strings are several times as fast as paths
    place, parts = str(root), key.split("/")
    for part in parts if itself else parts[:-1]:
        place = f"{place}/{part}"
        if os.path.islink(place):
            raise DamagedError(
                f"{place} is a link to {os.readlink(place)!r}; a store holds no links, and nothing behind this one "
                "was touched: delete it, or give what it leads to as --store"
            )


def is_folder(path: Path) -> bool:
    """Whether a path is a folder, and no link to one."""
    return stat.S_ISDIR(os.lstat(path).st_mode)


def read_regular(path: Path, most: int) -> bytes:
    """The whole file. Raises OSError; DamagedError for what is no regular file, or has more than `most` bytes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise DamagedError(f"{path} is no regular file; the store holds nothing else: delete it") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{path} is no regular file; the store holds nothing else: delete it")
        if status.st_size > most:
            raise DamagedError(f"{path} has {status.st_size} bytes; nothing that is read as a whole is so large")
        with open(descriptor, "rb", closefd=False) as stream:
            return stream.read()
    finally:
        os.close(descriptor)
