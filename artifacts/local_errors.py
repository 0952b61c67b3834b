"""What the operating system says about a local store, as messages that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from artifacts.errors import StoreError

TRIED = "after 1 attempt"
"""A disk that fails is not asked twice: after a failed fsync the second one would report success."""
ADVICE = {
    errno.EACCES: "check who owns the folder",
    errno.EPERM: "check who owns the folder",
    errno.EROFS: "the disk is mounted read-only; choose another store",
    errno.ENOTDIR: "a file is where a folder should be; move it away or choose another store",
    errno.EISDIR: "a folder is where a file should be; `posttrain verify` names what is damaged",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "a link is where a file should be; the store holds no links",
    errno.EIO: "the disk reports errors: check it, then run again",
    errno.EMFILE: "too many open files: raise `ulimit -n`",
    errno.ENOLCK: "its file system keeps no locks; choose another disk",
    errno.ESTALE: "the network file system lost the file: mount it again",
}


@contextlib.contextmanager
def reported(operation: str, path: Path, needed: int = 0, missing: bool = False) -> Iterator[None]:
    """Turns OSError into StoreError. `missing`: lets FileNotFoundError through, it is an answer.
    `needed`: bytes that the operation writes, named when the disk is full."""
    try:
        yield
    except FileNotFoundError as error:
        if missing:
            raise
        gone = Path(error.filename or path)
        if not gone.parent.is_dir() or os.path.lexists(gone):
            raise StoreError(f"cannot {operation} {path} {TRIED}: {gone} has disappeared; run again") from None
        # mkdir of a file system that holds no folders of ours says that there is none
        what = f"{gone} is not there, and cannot be made in {gone.parent}; choose another folder, or run again"
        raise StoreError(f"cannot {operation} {path} {TRIED}: {what}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(_full(operation, path, needed)) from None
        reason = error.strerror or type(error).__name__
        advice = ADVICE.get(error.errno or 0, "check the disk, then run again")
        raise StoreError(f"cannot {operation} {path} {TRIED}: {reason}; {advice}") from None


def _full(operation: str, path: Path, needed: int) -> str:
    folder = path
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    inodes = " and no file can be added (no inode left)" if status.f_files and not status.f_favail else ""
    return (
        f"cannot {operation} {path} {TRIED}: no space left in {folder}: {needed} bytes needed, "
        f"{shutil.disk_usage(folder).free} free{inodes}; make room or choose another store"
    )
