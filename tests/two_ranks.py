"""Two ranks that run one stage after another: to start a pair for each takes ten times as long as its work.

`accelerate launch ... two_ranks.py FOLDER OWNER [UNLIKE]` runs `FOLDER/0.ask`, `FOLDER/1.ask`, ..., each the path of a
spec, and puts each rank's exit status beside, until there is `FOLDER/end` or the process OWNER is gone. UNLIKE is the
`module:function` that makes the second rank another machine than the first.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

import stages.__main__
from flows.command import stage_command, stage_environment
from flows.launch_settings import Launch
from stages.leaving import leave
from tests.warm import Warm

Ranks = Callable[[Path], int]
"""The path of a spec -> the exit status of its stage, run by both."""

_PAUSE_SECONDS, _LIMIT_SECONDS = 0.02, 240.0


@contextlib.contextmanager
def two_ranks(folder: Path, warm: Warm, *unlike: str) -> Iterator[Ranks]:
    """Started by the launcher as those of a stage are, with one thread each."""
    folder.mkdir(parents=True)
    command = stage_command(Launch(processes=2), folder, threads=1)
    ranks = warm.command(__file__, str(folder), str(os.getpid()), *unlike)
    arguments = [*command.arguments[:-3], "--no_python", *ranks]
    numbers = itertools.count()
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(arguments, env=stage_environment(command), stdout=log, stderr=log)
    try:
        yield lambda spec: _ask(folder, process, next(numbers), spec)
        (folder / "end").touch()
        assert process.wait(_LIMIT_SECONDS) == 0, (folder / "log.txt").read_text()
    finally:
        (folder / "end").touch()
        process.kill()
        process.wait()


def _ask(folder: Path, process: subprocess.Popen[bytes], number: int, spec: Path) -> int:
    _put(folder / f"{number}.ask", str(spec))
    answers, deadline = [folder / f"{number}.{rank}" for rank in range(2)], time.monotonic() + _LIMIT_SECONDS
    while not all(answer.exists() for answer in answers):
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()[-3000:]
        time.sleep(_PAUSE_SECONDS)
    return max(int(answer.read_text()) for answer in answers)


def _put(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _serve(folder: Path, owner: int) -> None:
    for number in itertools.count():
        while not (asked := folder / f"{number}.ask").exists():
            if (folder / "end").exists() or not psutil.pid_exists(owner):
                return
            time.sleep(_PAUSE_SECONDS)
        _put(folder / f"{number}.{os.environ['RANK']}", str(stages.__main__.main([asked.read_text()])))


def _become_unlike(named: str) -> None:
    module, _, function = named.partition(":")
    getattr(importlib.import_module(module), function)()


if __name__ == "__main__":
    if len(sys.argv) > 3 and os.environ["RANK"] == "1":
        _become_unlike(sys.argv[3])
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
    leave(0)
