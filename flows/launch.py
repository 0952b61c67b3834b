"""One stage process: start it under its supervisor, follow its events and its log, and say why it failed.

A stage has succeeded when its exit status is 0 and `result.json` parses; nothing else counts.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.sealed import scrub
from flows.command import Command, LaunchSettings, stage_command, stage_environment
from flows.failure import explain, fails_again, killed_for_memory, may_pass, read_json, smaller_micro_batch
from flows.stage_result import Event, StageFailed, StageInterrupted, StageOutOfMemory, StageResult, StageStopped
from flows.supervisors import Supervisors, has_ended
from flows.tail import before_failure, follow_json, follow_lines, is_warning
from stages.visible import visible

POLL_SECONDS = 0.2
SCRIPT = "command.sh"
"""The exact command with its settings, for a person to repeat it: they are many words, so the log names the file."""
_LEFTOVERS = ("events.jsonl", "log.txt", "result.json", "error.json", "exit.json")


@dataclass(frozen=True)
class StageRun:
    """How a stage process was started, how long it ran, and the tokens of its largest forward pass, where it said."""

    command: Command
    seconds: float
    pass_tokens: int | None


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
                ended = has_ended(process, POLL_SECONDS) or live.stopping.is_set()
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
    result = read_json(job / "result.json")
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
