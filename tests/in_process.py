"""Whole recipes in this process: planned, leased, run and recorded as by `posttrain run`, without a start per stage.

Starting a process and importing torch takes ten times as long as the work of a tiny stage. Stages of several processes
are started as ever, unless two ranks are there for them (`tests.two_ranks`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import flows.making
import stages.__main__
from artifacts import Store, open_store
from artifacts.errors import PosttrainError
from flows.command import LaunchSettings
from flows.failure import explain
from flows.launch import run_stage_process
from flows.plan import Plan, plan
from flows.recipe import Recipe
from flows.run import Run
from flows.stage_result import StageFailed, StageResult
from stages.stage import STAGES
from tests.two_ranks import Ranks

Payload = dict[str, Any]


def run_here(
    recipe: Path,
    store: Path | str,
    settings: Sequence[str] = (),
    *,
    only: Sequence[str] = (),
    until: Sequence[str] = (),
    force: Sequence[str] = (),
    ranks: Ranks | None = None,
) -> Payload:
    """The payload of the run, of all stages or of some; stages that fail are entered as such, and what follows from
    them as skipped. `ranks`: they run the stages of two processes."""
    loaded = Recipe.load(str(recipe), list(settings))
    return run_planned(plan(loaded, open_store(str(store)), only=only, until=until, force=force), ranks)


def run_planned(planned: Plan, ranks: Ranks | None = None) -> Payload:
    """As `run_here`, of what was planned before."""
    run = Run(planned)
    with mock.patch.object(flows.making, "run_stage_process", partial(_run_stage, ranks)), run.supervisors:
        for name in run.pending():
            if (cause := run.blocked(name)) is not None:
                run.skip(name, cause)
            else:
                with contextlib.suppress(PosttrainError):
                    run.execute(name)
        return run.finish()


def _run_stage(
    ranks: Ranks | None, spec: dict[str, Any], launch: LaunchSettings, on_event: Callable[[Any], None], **rest: Any
) -> StageResult:
    """`python -m stages spec.json`, with what it leaves read as the launcher reads it."""
    if launch.processes > 1 and ranks is None:
        return run_stage_process(spec, launch, on_event, **rest)
    job = Path(spec["job"])
    job.mkdir(parents=True)
    (job / "spec.json").write_text(json.dumps(spec))
    status = _run_alone(job / "spec.json") if launch.processes == 1 or ranks is None else ranks(job / "spec.json")
    (job / "exit.json").write_text(json.dumps({"returncode": status}))
    if status != 0:
        message, expected = explain(job, status)
        raise StageFailed(message, expected=expected)
    result = json.loads((job / "result.json").read_text())
    return StageResult(**result, seconds=0.0, command=[])


def _run_alone(spec: Path) -> int:
    # the end of whoever started the tests is not the end of a flow
    with mock.patch.object(stages.__main__, "die_with_parent"):
        return stages.__main__.main([str(spec)])


def failures(payload: Payload) -> dict[str, str]:
    """Stage -> message of those that failed."""
    return {name: entry["error"] for name, entry in payload["stages"].items() if entry["state"] == "failed"}


def states(payload: Payload) -> dict[str, str]:
    """Stage -> its state."""
    return {name: entry["state"] for name, entry in payload["stages"].items()}


def identifiers(payload: Payload) -> dict[str, dict[str, str]]:
    """Stage -> output -> artifact id."""
    return {
        name: {output: found["id"] for output, found in entry["outputs"].items()}
        for name, entry in payload["stages"].items()
    }


def assert_nothing_half_written(store: Path | str, payload: Payload) -> None:
    """Every artifact is whole and was recorded; a stage that failed left no record, output or alias."""
    opened = open_store(str(store))
    for entry in payload["stages"].values():
        if entry["state"] == "failed" and entry["fingerprint"]:
            assert not opened.records(entry["uses"], entry["fingerprint"]) and not entry["outputs"], entry
    records = [record for stage in STAGES for record in opened.stage_records(stage)]
    recorded = {found.id for record in records for found in record.outputs.values()}
    stored = {artifact.id: opened.verify(artifact) for artifact in opened.artifacts()}
    assert not any(stored.values()), stored
    assert set(stored) <= recorded
    assert {found.id for found in opened.aliases().values()} <= recorded
    assert list(_strangers(opened)) == []


def _strangers(store: Store) -> Iterator[Path]:
    """Folders among a local store's artifacts that no manifest finishes."""
    if store.is_local:
        for folder in Path(store.url.removeprefix("file://")).glob("artifacts/*/*"):
            if not (folder / "manifest.json").is_file():
                yield folder
