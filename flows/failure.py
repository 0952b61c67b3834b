"""Why a stage process failed, in words: from `error.json`, `exit.json`, the exit status and the log."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from artifacts.errors import UnreachableError
from flows.tail import last_lines

_RANK_SIGNAL = re.compile(r"Signal (\d+) \(SIG\w+\) received by PID|exitcode\s*:\s*-(\d+)")
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|MemoryError", re.IGNORECASE)
_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded", re.IGNORECASE)
_PORT_TAKEN = re.compile(r"Address already in use|EADDRINUSE", re.IGNORECASE)
_PEER_GONE = re.compile(
    r"Connection (reset|closed) by (remote )?peer|DistNetworkError|RendezvousConnectionError|remote process exited"
)
_ERROR_LINE = re.compile(r"^(\[rank\d+\]:\s*)?([\w.]*(Error|Exception|Interrupt|Exit))(:.*)?$")


def explain(job: Path, returncode: int) -> tuple[str, bool]:
    """(message, whether the stage itself worded it for the user) for a stage process that gave no result."""
    error, ended = read_json(job / "error.json"), read_json(job / "exit.json")
    log = last_lines(job / "log.txt")
    if error is not None and error.get("expected"):
        return str(error["message"]), True
    where = f"; the whole output is in {job / 'log.txt'}"
    if ended is None:
        return f"the supervisor of stage {job.name} {_status(returncode)} and the stage with it{where}", False
    if ended.get("reason"):
        return f"stage {job.name}: {ended['reason']}{where}", False
    number = ended.get("signal") or _signal_of_a_rank(log)
    if number is not None:
        return f"stage {job.name} was {_killed_by(int(number), ended)}{_memory(ended)}{where}", False
    if error is not None:
        text = f"{error['type']}: {error['message']}"
        return f"stage {job.name} failed: {text}{_hint(text)}{where}", False
    if returncode == 0:
        return f"stage {job.name} ended with status 0 but left no valid result.json{where}", False
    text = _last_error(log)
    return f"stage {job.name} ended with status {returncode}: {text}{_hint(text)}{where}", False


def _status(returncode: int) -> str:
    return f"was {_killed_by(-returncode)}" if returncode < 0 else f"ended with status {returncode}"


def _killed_by(number: int, ended: Mapping[str, Any] | None = None) -> str:
    text = f"killed by signal {number}"
    if number != signal.SIGKILL:
        return f"{text} ({signal.strsignal(number)})"
    # SIGKILL that nobody here sent is what the kernel does when memory runs out
    kills = None if ended is None else ended.get("oom_kills")
    if kills:
        return f"{text}: out of memory, says the kernel"
    return text + ": out of memory?" + ("" if kills is None else " (the kernel counted no process killed for memory)")


def smaller_micro_batch(job: Path) -> int | None:
    """What a process that ran out of memory asks for, in tokens; None: none did, or it was killed."""
    error = read_json(job / "error.json")
    return None if error is None else error.get("smaller_micro_batch_tokens")


def killed_for_memory(job: Path) -> bool:
    """Whether the kernel killed a process of the stage and says that it was for memory."""
    ended = read_json(job / "exit.json")
    if ended is None or ended.get("reason") or not ended.get("oom_kills"):
        return False
    return (ended.get("signal") or _signal_of_a_rank(last_lines(job / "log.txt"))) == signal.SIGKILL


def may_pass(job: Path) -> bool:
    """Whether a stage failed for a reason outside itself that a later try may not meet: a store that did not answer, a
    port that was taken, a machine that went away. Not where a process was killed, or ran out of memory."""
    error, ended = read_json(job / "error.json"), read_json(job / "exit.json")
    if error is not None and error["type"] == UnreachableError.__name__:
        return True
    if ended is None or ended.get("reason") or ended.get("signal"):
        return False
    log = last_lines(job / "log.txt")
    if _signal_of_a_rank(log) is not None or (error is not None and error.get("expected")):
        return False
    text = f"{error['type']}: {error['message']}" if error is not None else _last_error(log)
    return not _OUT_OF_MEMORY.search(text) and bool(_PORT_TAKEN.search(text) or _PEER_GONE.search(text))


def fails_again(job: Path) -> bool:
    """Whether the stage said of itself that what it was given is wrong, so that every later try fails too."""
    error = read_json(job / "error.json")
    return error is not None and error.get("fails_again") is True


def _signal_of_a_rank(log: list[str]) -> int | None:
    """torchrun ends with status 1 whatever befell a worker; its report tells. SIGTERM is its own doing."""
    for line in log:
        for match in _RANK_SIGNAL.finditer(line):
            number = int(match[1] or match[2])
            if number != signal.SIGTERM:
                return number
    return None


def _memory(ended: dict[str, Any]) -> str:
    return f" (largest process: {ended['max_rss_bytes'] / 2**30:.1f} GiB)"


def _hint(text: str) -> str:
    if _OUT_OF_MEMORY.search(text):
        return "; out of memory: lower micro_batch_tokens or use more processes"
    return "; the disk is full: free some space or give another --store" if _DISK_FULL.search(text) else ""


def _last_error(log: list[str]) -> str:
    """The last line that looks like the end of a traceback, else the last line."""
    errors = [line.strip() for line in log if _ERROR_LINE.match(line.strip())]
    # ChildFailedError is torchrun's report that something else failed
    causes = [line for line in errors if "ChildFailedError" not in line] or errors or log[-1:]
    return causes[-1] if causes else "it printed nothing"


def read_json(path: Path) -> dict[str, Any] | None:
    """What a stage process left; None: it did not, or not whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
