"""A remote file system between the store and its caller that fails where it is told to."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

CALLS = (
    *("cat_file", "pipe_file", "put_file", "cp_file", "rm_file", "rm"),
    *("ls", "find", "info", "modified", "makedirs", "call_s3"),
)
"""What the store asks of a file system."""
READS = ("cat_file", "info", "modified", "call_s3")
LISTS = ("ls", "find")

Call = Callable[[], Any]
Decide = Callable[[int, str], "Fault | None"]
"""(number of the call from 1, its name) -> what it meets."""


class Killed(BaseException):
    """Stands for the end of the process: nothing below may catch it."""


class Fault:
    """One way in which a call goes wrong. `meets`: the kinds of calls that can go wrong so; `passes`: the same call
    may go well the next time."""

    def __init__(
        self, name: str, act: Callable[[Any, str, Call, tuple], Any], meets: tuple[str, ...], passes: bool = True
    ) -> None:
        self.name, self.act, self.meets, self.passes = name, act, meets, passes

    def __repr__(self) -> str:
        return self.name


class Interposed:
    """`decide(number, name)` says which fault, if any, the call of this number meets; calls are numbered from 1."""

    def __init__(self, inner: Any, decide: Decide) -> None:
        self.inner, self.decide = inner, decide
        self.calls, self.met = 0, 0
        self.last_written = ""
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.inner, name)
        if name not in CALLS:
            return method

        def run(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self.calls += 1
                fault = self.decide(self.calls, name)
                self.met += fault is not None
            if fault is None:
                answer = method(*arguments, **options)
                if name == "pipe_file":
                    self.last_written = str(arguments[0])
                return answer
            return fault.act(self, name, lambda: method(*arguments, **options), arguments)

        return run


def _raising(make: Callable[[], BaseException], applied: bool = False) -> Callable[[Interposed, str, Call, tuple], Any]:
    def act(_: Interposed, __: str, call: Call, ___: tuple) -> Any:
        if applied:
            call()
        raise make()

    return act


class HttpError(Exception):
    """An answer as botocore has it; botocore is where it says it comes from."""

    def __init__(self, status: int) -> None:
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": str(status)}}
        super().__init__(f"the store answers {status}")


HttpError.__module__ = "botocore.exceptions"


def _truncated(_: Interposed, name: str, call: Call, __: tuple) -> Any:
    answer = call()
    return answer[: len(answer) // 2] if isinstance(answer, bytes) else answer


def _short(fs: Interposed, name: str, call: Call, arguments: tuple) -> None:
    """Half of the data arrives, and the store says that all is well."""
    if name != "pipe_file":
        call()
        return
    fs.inner.pipe_file(arguments[0], arguments[1][: len(arguments[1]) // 2])


def _stale(fs: Interposed, name: str, call: Call, _: tuple) -> Any:
    """A list that does not have the newest file yet."""
    answer, newest = call(), "/" + fs.last_written.lstrip("/")
    if name == "ls":
        return [entry for entry in answer if not _is_only(fs, entry, newest)]
    return {path: info for path, info in answer.items() if "/" + path.lstrip("/") != newest}


def _is_only(fs: Interposed, entry: str, newest: str) -> bool:
    """Whether the newest file is all that there is below a listed name."""
    name = "/" + entry.strip("/")
    if not (newest == name or newest.startswith(f"{name}/")):
        return False
    return {"/" + path.lstrip("/") for path in fs.inner.find(name)} == {newest}


WRITES = ("pipe_file", "put_file", "rm_file", "rm")
TIMEOUT = Fault("timeout", _raising(lambda: TimeoutError("timed out")), CALLS)
RESET = Fault("reset", _raising(lambda: ConnectionResetError(errno.ECONNRESET, "reset by peer")), CALLS)
FORBIDDEN = Fault("403", _raising(lambda: PermissionError(errno.EACCES, "AccessDenied 403")), CALLS, passes=False)
BUSY = Fault("503", _raising(lambda: HttpError(503)), CALLS)
NOT_YET = Fault("404", _raising(lambda: FileNotFoundError(errno.ENOENT, "404")), READS)
TRUNCATED = Fault("truncated read", _truncated, ("cat_file",))
SHORT = Fault("short write", _short, ("pipe_file",))
STALE = Fault("stale list", _stale, LISTS)
LOST = Fault("answer lost", _raising(lambda: TimeoutError("no answer"), applied=True), CALLS)
IO_ERROR = Fault("input/output error", _raising(lambda: OSError(errno.EIO, "Input/output error")), CALLS)
FULL = Fault("no space", _raising(lambda: OSError(errno.ENOSPC, "No space left on device")), ("pipe_file", "put_file"))
FAULTS = (TIMEOUT, RESET, FORBIDDEN, BUSY, NOT_YET, TRUNCATED, SHORT, STALE, LOST, IO_ERROR, FULL)
DEATH = Fault("death", _raising(Killed), CALLS)
DEATH_AFTER = Fault("death after", _raising(Killed, applied=True), CALLS)


def at(number: int, fault: Fault, for_ever: bool = False) -> Decide:
    """The call `number` meets the fault, if it can, and with `for_ever` every later one that can."""

    def decide(now: int, name: str) -> Fault | None:
        due = now >= number if for_ever else now == number
        return fault if due and name in fault.meets else None

    return decide


def nth(number: int, fault: Fault, for_ever: bool = False) -> Decide:
    """The same, but of the calls that can meet the fault only they are counted."""
    met = 0

    def decide(_: int, name: str) -> Fault | None:
        nonlocal met
        if name not in fault.meets:
            return None
        met += 1
        return fault if (met >= number if for_ever else met == number) else None

    return decide


def death(number: int, after: bool) -> Decide:
    """The process ends before or after the call `number`; nothing that it still tries reaches the store."""

    def decide(now: int, name: str) -> Fault | None:
        if now == number:
            return DEATH_AFTER if after else DEATH
        return DEATH if now > number else None

    return decide
