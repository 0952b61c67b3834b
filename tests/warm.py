"""Processes that find torch, transformers and the stages imported: that takes ten times as long as the work of a tiny
stage.

`python -m tests.warm ADDRESS` imports them, computes nothing and starts no thread. Of it are forked those that tests
ask for (`warm_client`), each with its own environment, folder and output: processes like any other, to be killed too.
Those whose very start is looked at are started as ever.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import warm_client
from tests.warm_client import HAND_ON, SIZE_BYTES

ROOT = Path(__file__).resolve().parents[1]
_LIMIT_SECONDS = 240.0
_IMPORTED = ("stages", "stages.training", "stages.data", "stages.losses")
"""Packages whose modules all are."""


@dataclass(frozen=True)
class Warm:
    """Where to ask for a process."""

    address: str

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`python ARGUMENTS` (with `-c`, `-m` or a file) in the environment and folder of this process."""
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            files = (sys.__stdin__.fileno() if sys.__stdin__ else 0, stdout.fileno(), stderr.fileno())
            status = warm_client.ask(self.address, arguments, os.environ, files)
            texts = [(file.seek(0), file.read().decode(errors="replace"))[1] for file in (stdout, stderr)]
        return subprocess.CompletedProcess([*arguments], status, *texts)

    def command(self, *arguments: str) -> list[str]:
        """What torch's and accelerate's launchers start, told so, in place of `python ARGUMENTS`."""
        return [sys.executable, "-S", "-E", warm_client.__file__, self.address, *arguments]

    def interpreter(self, path: Path) -> str:
        """A program, made at that path, that is as good as `python` for a recipe's `launch.python`. Who looks for marks
        in the environments of processes finds that of the warm one."""
        path.write_text(f'#!/bin/sh\nexec {shlex.join(self.command())} "$@"\n')
        path.chmod(0o755)
        return str(path)


@contextlib.contextmanager
def warm(folder: Path, env: dict[str, str]) -> Iterator[Warm]:
    """`env`: what counts from the start of a process on, such as settings of the C library."""
    folder.mkdir(parents=True, exist_ok=True)
    address = folder / "socket"
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(address)],
            cwd=ROOT,
            env={**env, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,  # it ends when that is closed, by us or by our end
            stdout=log,
            stderr=log,
        )
    with process:
        deadline = time.monotonic() + _LIMIT_SECONDS
        while not address.exists():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
            time.sleep(0.02)
        yield Warm(str(address))


def _import_all() -> None:
    for name in _IMPORTED:
        for module in pkgutil.iter_modules(importlib.import_module(name).__path__):
            if not module.name.startswith("__"):
                importlib.import_module(f"{name}.{module.name}")
    importlib.import_module("torch._inductor.config")  # as `use_deterministic_algorithms` does
    from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401


def _serve(address: str) -> list[str] | None:
    """In each forked process its arguments; None in this one, at the end of stdin."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen()
    os.rename(f"{address}.new", address)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return None
        asking, _ = listener.accept()
        with asking:
            if os.fork() == 0:
                listener.close()
                return _keep(asking)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass


def _keep(asking: socket.socket) -> list[str]:
    """Between the one who asks and the process, whose arguments are given to itself."""
    size, files, _, _ = socket.recv_fds(asking, SIZE_BYTES, 3)
    asked = json.loads(asking.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    process = os.fork()
    if process == 0:
        asking.close()
        return _become(asked, files)
    handle = os.pidfd_open(process)
    while handle not in (ready := select.select([handle, asking], [], [])[0]):
        assert asking in ready
        os.kill(process, signal.SIGTERM if asking.recv(1) == HAND_ON else signal.SIGKILL)
    with contextlib.suppress(OSError):  # the one who asked is gone
        asking.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    os._exit(0)


def _become(asked: dict[str, Any], files: Sequence[int]) -> list[str]:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["folder"])
    return list(asked["arguments"])


def _main() -> None:
    gc.disable()
    _import_all()
    gc.freeze()
    gc.enable()
    assert len(os.listdir("/proc/self/task")) == 1, "a thread is not forked with its process"
    arguments = _serve(sys.argv[1])
    if arguments is None:
        return
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _main()
