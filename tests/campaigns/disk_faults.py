"""A local disk that fails where it is told to."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any

from artifacts.disk import Disk
from tests.campaigns.interposed import Call, Fault

STEPS = ("mkdir", "create", "write", "fsync", "rename", "unlink")


def _raising(code: int) -> Callable[[Any, str, Call, tuple], Any]:
    def act(_: Any, __: str, ___: Call, ____: tuple) -> Any:
        raise OSError(code, os.strerror(code))

    return act


def _full(disk: Any, name: str, _: Call, arguments: tuple) -> Any:
    """Half of what is written still finds room."""
    if name == "write":
        os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FULL = Fault("no space", _full, ("mkdir", "create", "write", "rename"), passes=False)
NOT_SYNCED = Fault("input/output error on fsync", _raising(errno.EIO), ("fsync",), passes=False)
IO_ERROR = Fault("input/output error", _raising(errno.EIO), STEPS, passes=False)
READ_ONLY = Fault("read-only", _raising(errno.EROFS), ("mkdir", "create", "rename", "unlink"), passes=False)
DISK_FAULTS = (FULL, NOT_SYNCED, IO_ERROR, READ_ONLY)


class FaultyDisk(Disk):
    """`decide(number, name)` says which fault a step meets; steps are numbered from 1."""

    def __init__(self, decide: Callable[[int, str], Fault | None]) -> None:
        self.decide, self.calls, self.met = decide, 0, 0
        self.lock = threading.Lock()


def _faulty(name: str) -> Callable[..., Any]:
    step = getattr(Disk, name)

    def run(self: FaultyDisk, *arguments: Any) -> Any:
        with self.lock:
            self.calls += 1
            fault = self.decide(self.calls, name)
            self.met += fault is not None
        if fault is None:
            return step(self, *arguments)
        return fault.act(self, name, lambda: step(self, *arguments), arguments)

    return run


for _name in STEPS:
    setattr(FaultyDisk, _name, _faulty(_name))
