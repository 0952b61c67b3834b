"""Which `posttrain ui` holds a Prefect home: one at a time, found by others through a lock that ends with it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from artifacts.errors import RequestError

PROBE_SECONDS = 1.0
"""Whoever looks holds the lock for an instant as well."""


@dataclass(frozen=True)
class Place:
    """Where a `posttrain ui` is found. `address`: of the pages; `url`: of the API."""

    address: str
    pool: str
    pid: int

    @property
    def url(self) -> str:
        """The API."""
        return f"{self.address}/api"


class Holder:
    """A home that this process holds."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def tell(self, place: Place) -> None:
        """From now on others find it."""
        content = json.dumps(asdict(place)).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content, 0)


@contextlib.contextmanager
def hold(home: Path) -> Iterator[Holder | Place]:
    """Holds the home, or gives the place of the one who does.

    Raises RequestError for one who does and does not answer yet.
    """
    home.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(home / "ui.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + PROBE_SECONDS
    try:
        while not _locked(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                place = _read(descriptor)
                if place is None:
                    raise RequestError(f"another `posttrain ui` is starting or ending in {home}; wait a moment")
                yield place
                return
            time.sleep(0.02)
        os.ftruncate(descriptor, 0)
        yield Holder(descriptor)
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def holder(home: Path) -> Place | None:
    """The `posttrain ui` of this home, if one runs and answers."""
    try:
        descriptor = os.open(home / "ui.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return None if _locked(descriptor, fcntl.LOCK_SH) else _read(descriptor)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(descriptor: int) -> Place | None:
    content = os.pread(descriptor, 4096, 0)
    return Place(**json.loads(content)) if content else None
