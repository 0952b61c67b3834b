"""Runs a server and leaves nothing of it behind: `python server_guard.py FOLDER [COMMAND...]`, stdin a pipe.

The pipe's closing means that whoever started us is gone or wants the server stopped; SIGTERM means the same. Then, or
when the server ends by itself, its whole process group is ended (SIGTERM, GRACE_SECONDS, SIGKILL) and FOLDER, which is
the server's, is removed: weights in shared memory would stay in memory. Exit status: the server's, 128 + its signal.
Without a command it keeps a folder alone.

Run by its path, in any environment: it imports the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time

GRACE_SECONDS = 3.0
_POLL_SECONDS = 0.1


def main(arguments: list[str]) -> int:
    """Run the command to its end."""
    folder, command = arguments[0], arguments[1:]
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: stopping.append(received))
    server = None
    try:
        if command:
            server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        while (server is None or server.poll() is None) and not stopping:
            with contextlib.suppress(InterruptedError):
                if select.select([sys.stdin], [], [], _POLL_SECONDS)[0] and not os.read(sys.stdin.fileno(), 512):
                    break
        if server is not None:
            _end(server)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    code = 0 if server is None else server.returncode
    return code if code >= 0 else 128 - code


def _end(server: subprocess.Popen[bytes]) -> None:
    """The server, and what it started."""
    _signal_group(server.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        time.sleep(_POLL_SECONDS)
    _signal_group(server.pid, signal.SIGKILL)
    server.wait()


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left of it
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
