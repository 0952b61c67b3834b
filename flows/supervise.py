"""The supervisor of one stage process: `python -m flows.supervise FD EXIT_JSON -- command...`

It lives in a session of its own, adopts every descendant of the command (child subreaper) and leaves none
behind, because the workers of torchrun sit in sessions of their own and outlive a signal to their launcher's
group. FD is the read end of a pipe whose write end only the flow holds: its closing means that the flow is
gone or wants the stage stopped. Then, or on SIGTERM, the command gets one SIGTERM (a second would abort the
clean-up of torchrun), GRACE_SECONDS, and SIGKILL for all that is left. If the supervisor itself is killed,
the kernel kills the command (PR_SET_PDEATHSIG), and each worker asks for the same against its parent.

EXIT_JSON is written last and atomically: `returncode` (null if a signal ended the command), `signal`,
`reason` (null if the command ended by itself), `killed` (how many descendants had to be killed),
`max_rss_bytes` (the largest resident size of one process), `oom_kills` (how many processes the kernel killed
meanwhile because memory ran out; null where it does not tell), `seconds`.

Imports the standard library and psutil only: it starts at once and cannot die of the flow's packages.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

GRACE_SECONDS = 4.0
"""Between SIGTERM and SIGKILL; with the rest it stays below ten seconds, after which nothing may be left."""

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LINUX = sys.platform == "linux"


def main(arguments: list[str]) -> int:
    """Run the command to its end; returns its exit status, or 128 + signal."""
    if len(arguments) < 4 or arguments[2] != "--":
        print("usage: python -m flows.supervise FD EXIT_JSON -- command...", file=sys.stderr)
        return 2
    parent_pipe, exit_path, command = int(arguments[0]), Path(arguments[1]), arguments[3:]
    if LINUX:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
    else:
        print(
            f"flows.supervise: {sys.platform} has no child subreaper and no parent-death signal: if a "
            "launcher is killed by hand, its workers may be left; end them yourself",
            file=sys.stderr,
        )
    # a core file would lie in the job folder, with every secret of the environment
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    wakeup = _wake_on_signals()
    started, kills_before = time.monotonic(), oom_kills()
    try:
        launcher = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with(os.getpid())
        )
    except OSError as error:
        problem = f"cannot start {command[0]}: {error.strerror or error}"
        print(f"flows.supervise: {problem}", file=sys.stderr)
        _write_exit(exit_path, {"returncode": 127, "signal": None, "reason": problem}, started, killed=0)
        return 127
    status, reason = _follow(launcher.pid, parent_pipe, wakeup)
    killed, late_status = _kill_descendants(launcher.pid)
    status = late_status if status is None else status
    code = os.waitstatus_to_exitcode(status) if status is not None else -signal.SIGKILL
    result = {
        "returncode": code if code >= 0 else None,
        "signal": -code if code < 0 else None,
        "reason": reason,
        "oom_kills": kills_since(kills_before),
    }
    _write_exit(exit_path, result, started, killed)
    return code if code >= 0 else 128 - code


def _follow(pid: int, parent_pipe: int, wakeup: int) -> tuple[int | None, str | None]:
    """(wait status of the launcher or None if it outlived the grace, why it was stopped or None)."""
    reason: str | None = None
    deadline: float | None = None
    watched = [parent_pipe, wakeup]
    while True:
        status = _reap(pid)
        if status is not None:
            return status, reason
        remaining = None if deadline is None else deadline - time.monotonic()
        if remaining is not None and remaining <= 0:
            return None, reason
        ready = select.select(watched, [], [], remaining)[0]
        stop: str | None = None
        if wakeup in ready and set(os.read(wakeup, 512)) & {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}:
            stop = "the supervisor was asked to stop"
        if parent_pipe in ready and not os.read(parent_pipe, 512):
            watched.remove(parent_pipe)
            stop = "the flow ended or stopped this stage"
        if stop is not None and reason is None:
            reason, deadline = stop, time.monotonic() + GRACE_SECONDS
            _signal(pid, signal.SIGTERM)


def _kill_descendants(launcher: int) -> tuple[int, int | None]:
    """SIGKILL until none is left; (how many were killed, wait status of the launcher if among them)."""
    killed: set[int] = set()
    status: int | None = None
    myself = psutil.Process()
    deadline = time.monotonic() + 5
    # A dying process may fork once more before the signal lands: only an empty look around ends this.
    while time.monotonic() < deadline:
        living = [child for child in myself.children(recursive=True) if _alive(child)]
        for child in living:
            _signal(child.pid, signal.SIGKILL)
            killed.add(child.pid)
        reaped = _reap(launcher)
        status = reaped if reaped is not None else status
        if not living:
            break
        time.sleep(0.01)  # psutil's own wait would take the launcher's status away from us
    return len(killed), status


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _reap(pid: int) -> int | None:
    """Collect every ended child, adopted ones too; the wait status of `pid` if it is among them."""
    found: int | None = None
    while True:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if ended == 0:
            return found
        if ended == pid:
            found = status


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended meanwhile, which is what was wanted
        os.kill(pid, number)


def _wake_on_signals() -> int:
    """A descriptor that gets one byte (its number) for every signal, so that one `select` sees everything."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return read_end


def oom_kills(root: Path = Path("/")) -> dict[str, int]:
    """Every counter of processes killed for memory that the kernel shows us -> its value; rising numbers.

    The control group's own (version 2: memory.events, version 1: memory.oom_control), and the machine's.
    """
    places = [root / "proc/vmstat"]
    groups = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                places.append(groups / group.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                # a container may see its own group as the root
                tops = groups / "memory" / group.lstrip("/"), groups / "memory"
                places += [top / "memory.oom_control" for top in tops]
    found = {}
    for place in places:
        with contextlib.suppress(OSError, ValueError):
            values = dict(line.split(maxsplit=1) for line in place.read_text().splitlines())
            if "oom_kill" in values:
                found[str(place)] = int(values["oom_kill"])
    return found


def kills_since(before: dict[str, int], root: Path = Path("/")) -> int | None:
    """By how much the counters rose, at most; None: there are none."""
    now = oom_kills(root)
    return max((now[place] - count for place, count in before.items() if place in now), default=None)


def _die_with(parent: int) -> Callable[[], None] | None:
    """What the command does between fork and exec: ask the kernel to be killed with its supervisor."""
    if not LINUX:
        return None
    library = ctypes.CDLL(None, use_errno=True)  # loaded before the fork

    def prepare() -> None:
        library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the supervisor was killed before the request was in force
            os._exit(1)

    return prepare


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}) failed: {os.strerror(code)}")


def _write_exit(path: Path, result: dict[str, Any], started: float, killed: int) -> None:
    # Linux counts ru_maxrss in KiB, macOS in bytes
    unit = 1024 if LINUX else 1
    result |= {
        "killed": killed,
        "max_rss_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit,
        "seconds": round(time.monotonic() - started, 3),
    }
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(result))
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
