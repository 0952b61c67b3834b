"""One stage process: start it under its supervisor, follow its events and its log, and say why it failed.

A stage has succeeded when its exit status is 0 and `result.json` parses; nothing else counts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from artifacts.errors import StageError
from artifacts.sealed import scrub
from flows import supervise
from flows.command import Command, LaunchSettings, stage_command, stage_environment
from flows.failure import explain, fails_again, killed_for_memory, may_pass, smaller_micro_batch
from flows.tail import before_failure, follow_json, follow_lines, is_warning, scrub_file
from stages.visible import visible

logger = logging.getLogger(__name__)

Event = dict[str, Any]

POLL_SECONDS = 0.2
STOP_SECONDS = supervise.GRACE_SECONDS + 5
"""A supervisor that takes longer to stop than this is itself stuck, and is killed."""

SCRIPT = "command.sh"
"""The exact command with its settings, for a person to repeat it: they are many words, so the log names the file."""
_LEFTOVERS = ("events.jsonl", "log.txt", "result.json", "error.json", "exit.json")
JOB_VARIABLE = "POSTTRAIN_JOB"
"""Marks every process of a stage, so that they are found even where their supervisor was killed."""


class StageFailed(StageError):
    """A stage process ended without a result. `expected`: the message says it all, no traceback is needed.
    `lasting`: it is known that every later try fails too."""

    def __init__(self, message: str, *, expected: bool = False, lasting: bool = False) -> None:
        self.expected, self.lasting = expected, lasting
        super().__init__(message)


class StageOutOfMemory(StageFailed):
    """Memory did not suffice. `smaller`: the micro_batch_tokens to try next; None: no forward pass had begun."""

    def __init__(self, message: str, *, expected: bool = False, smaller: int | None = None) -> None:
        self.smaller = smaller
        super().__init__(message, expected=expected)


class StageInterrupted(StageFailed):
    """Something outside the stage failed that may work when it is tried again: storage, a port, another machine."""


class StageStopped(StageFailed):
    """The stage was stopped because the flow ends; it can be resumed from its last checkpoint."""


@dataclass(frozen=True)
class StageResult:
    """`result.json` of a stage that succeeded, with how it was run."""

    outputs: dict[str, dict[str, str]]
    metrics: dict[str, Any]
    timings: dict[str, Any]
    counts: dict[str, Any]
    resumed_from: int | None
    seconds: float
    command: list[str]


@dataclass(frozen=True)
class StageRun:
    """How a stage process was started, how long it ran, and the tokens of its largest forward pass, where it said."""

    command: Command
    seconds: float
    pass_tokens: int | None


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


def run_stage_process(
    spec: dict[str, Any],
    launch: LaunchSettings,
    on_event: Callable[[Event], None],
    *,
    on_warning: Callable[[str], None] | None = None,
    supervisors: Supervisors | None = None,
) -> StageResult:
    """Run the stage of `spec` in its job folder and wait for it.

    `on_event` gets what the stage reports (`phase`, `progress`, `log`, `micro_batch`, `resumed`) after a first
    `command` event; `on_warning` the lines of its output that are warnings or worse. Raises StageFailed,
    StageOutOfMemory, StageInterrupted, or StageStopped where `supervisors` were stopped meanwhile.
    """
    job = Path(spec["job"])
    command = _prepare(job, spec, launch)
    text = f"sh {shlex.quote(str(job / SCRIPT))}"
    on_event({"kind": "command", "text": text, "arguments": command.arguments, "time": time.time()})
    started = time.monotonic()
    with contextlib.nullcontext(supervisors) if supervisors else Supervisors() as live:
        with live.start(command, job, stage_environment(command)) as process:
            events, lines = follow_json(job / "events.jsonl"), before_failure(follow_lines(job / "log.txt"))
            ended, pass_tokens = False, None
            while not ended:
                ended = _wait(process, POLL_SECONDS) or live.stopping.is_set()
                for event in next(events):
                    pass_tokens = event["tokens"] if event["kind"] == "micro_batch" else pass_tokens
                    on_event(event)
                for line in next(lines):
                    if on_warning is not None and is_warning(line):
                        on_warning(scrub(line))
        try:
            return _result(job, process, live, StageRun(command, time.monotonic() - started, pass_tokens))
        except StageFailed as error:
            if error.expected and not isinstance(error, StageStopped):  # else the message names it
                on_event({"kind": "log", "text": f"the whole output is in {job / 'log.txt'}"})
            raise


def _prepare(job: Path, spec: dict[str, Any], launch: LaunchSettings) -> Command:
    """The job folder with the stage's spec and nothing of an earlier attempt. Raises StageFailed."""
    try:
        job.mkdir(parents=True, exist_ok=True)
        for name in _LEFTOVERS:
            (job / name).unlink(missing_ok=True)
        command = stage_command(launch, job, threads=spec["threads"])
        (job / "spec.json").write_text(json.dumps({**spec, "command": command.arguments}, indent=1))
        (job / SCRIPT).write_text(scrub(f"cd {shlex.quote(str(job))}\n{command.shell()}\n"))
    except OSError as error:
        raise StageFailed(
            f"stage {job.name} cannot be started: no job folder {job}: {error.strerror}; free some space, allow "
            "writing there, or give another --store",
            expected=True,
        ) from error
    return command


def _result(job: Path, process: subprocess.Popen[bytes], live: Supervisors, run: StageRun) -> StageResult:
    result = _read_json(job / "result.json")
    if process.returncode == 0 and result is not None:
        return StageResult(
            outputs=result["outputs"],
            metrics=result["metrics"],
            timings=result["timings"],
            counts=result["counts"],
            resumed_from=result.get("resumed_from"),
            seconds=run.seconds,
            command=run.command.arguments,
        )
    if live.stopping.is_set():
        raise StageStopped(f"stage {job.name} was stopped because the run ended", expected=True)
    said, expected = explain(job, process.returncode)
    message = visible(said)
    if (smaller := smaller_micro_batch(job)) is not None:
        raise StageOutOfMemory(message, expected=expected, smaller=smaller)
    if killed_for_memory(job):
        raise StageOutOfMemory(message, smaller=None if run.pass_tokens is None else run.pass_tokens // 2)
    if may_pass(job):
        raise StageInterrupted(message, expected=expected)
    raise StageFailed(message, expected=expected, lasting=expected and fails_again(job))


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _await_end(process: subprocess.Popen[bytes], job: Path) -> None:
    """Until the supervisor has ended; what a killed one left is ended here."""
    if not _wait(process, STOP_SECONDS):
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


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
