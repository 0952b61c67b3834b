"""`python -m stages spec.json`: run one stage with nothing else around it.

Reads the inputs from the store, runs, puts the outputs, appends the index record, and writes `result.json` last.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from artifacts import Artifact, Record, open_store, scrub
from artifacts.errors import OutOfMemory, PosttrainError, StageError
from stages.context import FAILED_LINE, Context
from stages.fails_again import fails_again
from stages.garbage import look_seldom
from stages.identity import operational_config
from stages.leaving import leave
from stages.scrubbing import scrubbed_output
from stages.spec import Spec
from stages.usage import Meter, machine_facts

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Exit status 0: done and recorded. 1: `error.json` in the job folder says why not. 2: no usable spec."""
    if len(arguments) != 1:
        print("usage: python -m stages SPEC.json", file=sys.stderr)
        return 2
    die_with_parent()
    with scrubbed_output():
        return _main(Path(arguments[0]))


def _main(path: Path) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would say a line a request
    # of peft's imports: it wants a package for quantization on a CPU, which no stage does
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        spec = Spec.read(path)
    except StageError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        run_spec(spec)
    except BaseException as error:
        _report_failure(Path(spec.job), error)
        return 1
    return 0


def run_spec(spec: Spec) -> None:
    """Run the stage of a spec in this process; only rank 0 publishes."""
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != spec.processes:
        raise StageError(f"{spec.name} was to run in {spec.processes} processes, but the launcher made {world}")
    meter = Meter(world)
    context = Context(spec, open_store(spec.store), rank=rank)
    if context.stage.single and world > 1:
        raise StageError(f"{spec.name} ({spec.stage}) runs in one process, but the launcher made {world}; start one")
    with context.held:
        with context.resources:
            _require_columns(context)
            context.stage.run(context)
        if context.is_main:
            context.timings = _timings(context, meter.read())
            publish(context)


def _require_columns(context: Context) -> None:
    """Rewards that ask for what the rows do not have would say so once models are loaded and completions made."""
    if getattr(context.config, "rewards", ()):
        from stages.rollouts.reward_columns import require_columns_of_rewards

        require_columns_of_rewards(context)


def _timings(context: Context, used: Mapping[str, float]) -> dict[str, Any]:
    """What the run of the stage took; the stage itself knows best how fast it was."""
    timings = {**used, **context.timings}
    if context.tokens:
        timings["tokens"] = context.tokens
        timings.setdefault("tokens_per_second", context.tokens / max(used["seconds"], 1e-9))
    return timings


def publish(context: Context) -> None:
    """Put the outputs, append the record, drop the working state that it replaces, write `result.json` last."""
    spec = context.spec
    context.held.require_unchanged()
    outputs = {name: _put(context, name, kind) for name, kind in context.stage.outputs_of(context.config).items()}
    context.store.append_record(
        Record(
            stage=spec.stage,
            fingerprint=spec.fingerprint,
            identity=spec.identity,
            outputs=outputs,
            metrics=context.metrics,
            counts=context.counts,
            timings=context.timings,
            provenance=_provenance(context),
        )
    )
    context.checkpoints.clear()
    context.shards.clear()
    _write_json(
        Path(spec.job) / "result.json",
        {
            "outputs": {name: {"kind": found.kind, "id": found.id} for name, found in outputs.items()},
            "metrics": context.metrics,
            "timings": context.timings,
            "counts": context.counts,
            "resumed_from": context.resumed_from,
        },
    )


def _put(context: Context, name: str, kind: str) -> Artifact:
    """The output as an artifact, which it is already where it was handed on."""
    spec = context.spec
    if (artifact := context.handed_on.get(name)) is not None:
        if not context.store.renew(artifact):
            raise StageError(f"{artifact}, which was to be handed on, is gone from {context.store.url}; run again")
        return artifact
    folder = Path(spec.job) / "out" / name
    if not folder.is_dir():
        raise StageError(f"stage {spec.stage} ended without writing its output {name!r}")
    context.phase(f"storing {name}")
    return context.store.put(
        kind,
        folder,
        producer={key: spec.identity[key] for key in ("stage", "version", "config", "inputs")},
        metrics=context.metrics,
        counts=context.counts,
        needs=context.needs,
    )


def _provenance(context: Context) -> dict[str, Any]:
    from artifacts.manifest import library_versions

    return {
        "run": context.spec.run,
        "recipe": context.spec.recipe,
        "stage_name": context.spec.name,
        "command": context.spec.command,
        "source": context.spec.source,
        "processes": context.processes,
        "threads": context.threads,
        "launcher": context.spec.launcher,
        "operational": operational_config(context.config),
        "machine": machine_facts(),
        "resumed_from": context.resumed_from,
        "finished_at": time.time(),
        "versions": library_versions(),
    }


def _report_failure(job: Path, error: BaseException) -> None:
    print(FAILED_LINE, file=sys.stderr)
    traceback.print_exception(error)
    # nobody reads unfinished outputs, and on a full disk they would leave no room for the message
    shutil.rmtree(job / "out", ignore_errors=True)
    path = job / "error.json"
    if path.exists():  # the rank that failed first tells the cause, the others only its consequences
        return
    _write_json(
        path,
        {
            "type": type(error).__name__,
            "message": scrub(str(error)) or type(error).__name__,
            "traceback": scrub("".join(traceback.format_exception(error))),
            "expected": isinstance(error, PosttrainError),
            "fails_again": fails_again(error),
            "smaller_micro_batch_tokens": error.micro_batch_tokens if isinstance(error, OutOfMemory) else None,
        },
    )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(values, indent=1, default=str), encoding="utf-8")
    temporary.replace(path)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it dies (Linux; elsewhere nothing)."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    look_seldom()
    leave(main(sys.argv[1:]))
