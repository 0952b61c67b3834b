"""Holds on names, by processes of one machine, until they end: kept by the kernel, with one handle for all names.

A name is one byte of one lock file in a folder, at the offset that its hash says; who holds it has a shared lock on
that byte, and names that meet there are only kept together. The locks belong to the open file (Linux 3.15), not to the
process, which would lose all of them when it closes any other handle on the file. A child of a fork shares the open
file: what its parent held stays held until both have ended.

Systems without such locks (macOS) get FILES files that are locked whole: no more handles than that, and what shares a
file with a name that is held is kept as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from artifacts.local_errors import reported
from artifacts.locks import is_at

LOCK = ".lock"
FILES = 64
SECONDS_BETWEEN_LOOKS = 0.005
BYTES_CAN_BE_LOCKED = sys.platform == "linux"
_held: dict[Path, int] = {}
"""Lock files that this process has open, until it ends."""
_one_thread = threading.Lock()


def hold(folder: Path, name: str) -> None:
    """From now on until this process ends, nobody is `alone` with the name; waits for who is. Whoever deletes the lock
    file deletes the holds with it: the next one begins a new file."""
    path, offset = _place(folder, name)
    with reported("lock", path), _one_thread:
        while True:
            descriptor = _mine(path)
            _lock(descriptor, offset, fcntl.LOCK_SH)
            if is_at(descriptor, path):
                return


@contextlib.contextmanager
def alone(folder: Path, name: str, patience_seconds: float = 0.0) -> Iterator[bool]:
    """True: nobody holds the name or is alone with it, and who wants to waits for the end. False: somebody does, or is,
    perhaps this process itself, for longer than the patience."""
    path, offset = _place(folder, name)
    deadline = time.monotonic() + patience_seconds
    with reported("lock", path):
        descriptor = _opened(path)
    try:
        while not (free := _is_free(descriptor, offset, path)) and time.monotonic() < deadline:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        yield free
    finally:
        os.close(descriptor)


def _mine(path: Path) -> int:
    if path in _held and not is_at(_held[path], path):
        os.close(_held.pop(path))
    if path not in _held:
        _held[path] = _opened(path)
    return _held[path]


def _opened(path: Path) -> int:
    return os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)


def _is_free(descriptor: int, offset: int, path: Path) -> bool:
    with reported("lock", path):
        try:
            _lock(descriptor, offset, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return is_at(descriptor, path)


def _place(folder: Path, name: str) -> tuple[Path, int]:
    """The lock file and the byte of a name."""
    offset = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
    return (folder / LOCK, offset) if BYTES_CAN_BE_LOCKED else (folder / f"{LOCK}-{offset % FILES}", 0)


def _lock(descriptor: int, offset: int, how: int) -> None:
    """`how`: as for flock. Raises BlockingIOError."""
    if not BYTES_CAN_BE_LOCKED:
        fcntl.flock(descriptor, how)
        return
    command = fcntl.F_OFD_SETLK if how & fcntl.LOCK_NB else fcntl.F_OFD_SETLKW
    kind = fcntl.F_RDLCK if how & fcntl.LOCK_SH else fcntl.F_WRLCK
    # struct flock: kind, from where the offset counts, offset, bytes, no process
    fcntl.fcntl(descriptor, command, struct.pack("@hhqqi", kind, os.SEEK_SET, offset, 1, 0))


def _in_a_child() -> None:
    """A fork: what is open stays so, and the child's own holds end with the child."""
    global _one_thread
    _held.clear()
    _one_thread = threading.Lock()


os.register_at_fork(after_in_child=_in_a_child)
