"""A launcher with workers that resist: none ends on SIGTERM, each forks once more for it, and each that was forked
sits in a session of its own. Who stands says so in the file `config.ready`."""

import json
import os
import signal
import socket
import sys
from pathlib import Path

READY = Path(json.loads(Path(sys.argv[1]).read_text())["config"]["ready"])


def announce(text: str) -> None:
    with open(READY, "a") as file:
        file.write(f"{text}\n")


def resist(*_: object) -> None:
    """For a SIGTERM: one more process, which the launcher of a moment ago knows nothing of."""
    if os.fork() == 0:
        os.setsid()
        wait()


def wait() -> None:
    signal.signal(signal.SIGTERM, resist)
    while True:
        signal.pause()


def in_a_process(name: str) -> bool:
    """True in the new process, which leads a session of its own."""
    if os.fork() != 0:
        return False
    os.setsid()
    signal.signal(signal.SIGTERM, resist)
    announce(f"{name}={os.getpid()}")
    return True


def worker() -> None:
    """Like a rank of torchrun, with a port and a loader's worker."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    if in_a_process("loader"):
        wait()
    announce(f"port={server.getsockname()[1]}")
    wait()


def forward(*_: object) -> None:
    """Like torchrun: the workers get the signal, too."""
    resist()
    for pid in workers:
        os.kill(pid, signal.SIGTERM)


workers: list[int] = []
signal.signal(signal.SIGTERM, forward)
pid = os.fork()
if pid == 0:
    os.setsid()
    announce(f"worker={os.getpid()}")
    worker()
workers.append(pid)
if os.fork() == 0:
    if in_a_process("daemon"):
        wait()
    os._exit(0)  # its parent leaves at once
announce(f"launcher={os.getpid()}")
while True:
    signal.pause()
