"""`python warm_client.py ADDRESS FILE ARGUMENTS`: stands for `python FILE ARGUMENTS`, which a warm process forks.

It ends as that process ends, by a signal too, and hands SIGTERM on to it. Imports nothing that takes time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SIZE_BYTES = 8
HAND_ON = b"t"
"""Sent while the process runs: it is to get SIGTERM."""


def ask(
    address: str,
    arguments: Sequence[str],
    env: Mapping[str, str],
    files: Sequence[int],
    asked: Callable[[socket.socket], Any] = lambda asking: None,
) -> int:
    """The exit status of `python ARGUMENTS`, as `subprocess` gives it. `files`: its stdin, stdout and stderr; `asked`:
    called once it is on its way."""
    text = json.dumps({"arguments": list(arguments), "env": dict(env), "folder": os.getcwd()}).encode()
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(address)
        socket.send_fds(asking, [len(text).to_bytes(SIZE_BYTES, "big")], files)
        asking.sendall(text)
        asked(asking)
        with asking.makefile() as answer:
            return int(answer.readline())


def _main() -> None:
    def hand_on(asking: socket.socket) -> None:
        signal.signal(signal.SIGTERM, lambda *_: asking.sendall(HAND_ON))

    status = ask(sys.argv[1], sys.argv[2:], os.environ, (0, 1, 2), hand_on)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    _main()
