"""Processes that end between two steps on a disk."""

import os
import threading
from collections.abc import Callable
from typing import Any

from artifacts.disk import Disk

DIED = 9


class DyingDisk(Disk):
    """Ends the process before or after its step number `last`."""

    def __init__(self, last: int, after: bool) -> None:
        self.count, self.last, self.after = 0, last, after
        self.lock = threading.Lock()


def _dying(name: str) -> Callable[..., Any]:
    step = getattr(Disk, name)

    def run(self: DyingDisk, *arguments: Any) -> Any:
        with self.lock:
            self.count += 1
            mine = self.count
        if mine == self.last and not self.after:
            os._exit(DIED)
        try:
            return step(self, *arguments)
        finally:
            if mine == self.last and self.after:
                os._exit(DIED)

    return run


for _name in ("mkdir", "create", "write", "fsync", "rename", "unlink"):
    setattr(DyingDisk, _name, _dying(_name))


def in_child(work: Callable[[], object]) -> int:
    """Exit status of `work()` in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
