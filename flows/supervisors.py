"""The supervisors of a flow's stage processes: each is started with a pipe whose closing tells it to end its stage."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

from flows import supervise
from flows.command import Command
from flows.stage_result import StageStopped
from flows.tail import scrub_file

logger = logging.getLogger(__name__)

STOP_SECONDS = supervise.GRACE_SECONDS + 5
"""A supervisor that takes longer to stop than this is itself stuck, and is killed."""

JOB_VARIABLE = "POSTTRAIN_JOB"
"""Marks every process of a stage, so that they are found even where their supervisor was killed."""


class Supervisors:
    """The live stage processes of one flow. Leaving the `with` block, however it is left, ends them all.

    Stages run in threads, which see neither Ctrl-C nor a cancellation; the main thread does.
    """

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._pipes: set[int] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Supervisors:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close every pipe: each supervisor then ends its stage. No new one can be started."""
        with self._lock:
            self.stopping.set()
            for pipe in self._pipes:
                os.close(pipe)
            self._pipes.clear()

    @contextlib.contextmanager
    def start(self, command: Command, job: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
        """The supervisor of `command`; it is told to stop when the block is left."""
        read_end, write_end = os.pipe()
        with self._lock:
            if self.stopping.is_set():
                os.close(read_end)
                os.close(write_end)
                raise StageStopped(f"{job.name} was not started: the flow is ending", expected=True)
            self._pipes.add(write_end)
        # by its path and with -P: what lies in the job folder must not be imported
        program = [sys.executable, "-P", supervise.__file__, str(read_end), str(job / "exit.json"), "--"]
        try:
            with open(job / "log.txt", "ab") as log:
                process = subprocess.Popen(
                    [*program, *command.arguments],
                    cwd=job,
                    env={**env, JOB_VARIABLE: str(job)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(read_end,),
                    start_new_session=True,
                )
        except BaseException:
            self._close(write_end)
            raise
        finally:
            os.close(read_end)
        try:
            yield process
        finally:
            self._close(write_end)
            _await_end(process, job)

    def _close(self, pipe: int) -> None:
        with self._lock:
            if pipe in self._pipes:
                self._pipes.remove(pipe)
                os.close(pipe)


def has_ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it has ended, or does within that time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _await_end(process: subprocess.Popen[bytes], job: Path) -> None:
    """Until the supervisor has ended; what a killed one left is ended here."""
    if not has_ended(process, STOP_SECONDS):
        logger.warning("the supervisor of %s did not end within %.0f s; killing it", job.name, STOP_SECONDS)
        process.kill()
        process.wait()
    if not (job / "exit.json").exists():
        _sweep(job)
    for log in (job / "log.txt", *job.glob("*.log")):  # its own, and those of servers that it had
        scrub_file(log)


def _sweep(job: Path) -> None:
    """Kill what still carries the mark of this job; mostly the kernel already did, with the supervisor."""
    for other in psutil.process_iter():
        try:
            if other.environ().get(JOB_VARIABLE) == str(job):
                other.kill()
        except psutil.Error:
            continue  # ended meanwhile, or another user's
