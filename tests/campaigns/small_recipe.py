"""A recipe of three stages in a few milliseconds: rows, a training with checkpoints, a score in shards.

What they write follows from their inputs through a chain of hashes, so a step that is lost, done twice or resumed from
a wrong state shows in the bytes. Which fingerprints were worked on is written down.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import flows.making
import stages.__main__
from artifacts import DamagedError, MissingError, PosttrainError, Store, sha256_bytes
from flows.plan import plan
from flows.recipe import Recipe
from flows.run import Run
from flows.stage_result import StageResult
from stages.context import Context
from stages.spec import Spec
from stages.stage import Config, Input, Stage

STEPS, CHECKPOINT_STEPS, PIECES = 6, 2, 3


class SmallConfig(Config):
    size: int = 8
    """How many rows there are."""


def _rows(context: Context) -> None:
    rows = "\n".join(f"row {number}" for number in range(context.config.size))
    (context.output("dataset") / "rows.txt").write_text(rows)
    context.counts["rows"] = context.config.size


def _train(context: Context) -> None:
    data = (context.input("dataset") / "rows.txt").read_bytes()
    found = context.checkpoints.latest()
    step, state = 0, b""
    if found is not None:
        step, state = found[0], (found[1] / "state").read_bytes()
        context.resumed(step)
    while step < STEPS:
        step, state = step + 1, sha256_bytes(state + data).encode()
        if step % CHECKPOINT_STEPS == 0 and step < STEPS:
            folder = context.scratch / f"{step}"
            folder.mkdir(exist_ok=True)
            (folder / "state").write_bytes(state)
            context.checkpoints.save(step, folder)
    (context.output("model") / "weights").write_bytes(state * 50)
    context.metrics["loss"] = 1 / step


def _score(context: Context) -> None:
    weights = (context.input("model") / "weights").read_bytes()
    pieces = [_piece(context, f"{number}", weights) for number in range(PIECES)]
    (context.output("report") / "scores").write_bytes(b"\n".join(pieces))


def _piece(context: Context, name: str, weights: bytes) -> bytes:
    with contextlib.suppress(DamagedError, MissingError):
        return context.shards.load(name)
    piece = sha256_bytes(weights + name.encode()).encode()
    context.shards.save(name, piece)
    return piece


DATASET, MODEL = Input(("dataset",)), Input(("model",))
STAGES = (
    Stage(name="rows", version=1, config=SmallConfig, inputs={}, outputs={"dataset": "dataset"}, run=_rows),
    Stage(name="train", version=1, config=Config, inputs={"dataset": DATASET}, outputs={"model": "model"}, run=_train),
    Stage(name="score", version=1, config=Config, inputs={"model": MODEL}, outputs={"report": "report"}, run=_score),
)
RECIPE = {
    "name": "small",
    "stages": {
        "rows": {"uses": "rows"},
        "train": {"uses": "train", "inputs": {"dataset": "rows"}},
        "score": {"uses": "score", "inputs": {"model": "train"}},
    },
}


@contextlib.contextmanager
def installed() -> Iterator[Recipe]:
    """The three stages are the ones there are; gives the recipe."""
    modules = {}
    for stage in STAGES:
        modules[f"stages.{stage.name}"] = module = types.ModuleType(f"stages.{stage.name}")
        module.STAGE = stage
    names = tuple(stage.name for stage in STAGES)
    with mock.patch.dict(sys.modules, modules), mock.patch("stages.stage.STAGES", names):
        yield Recipe.from_dict(RECIPE)


@dataclass
class Attempt:
    """One run of the recipe. `worked_on`: fingerprints that were not taken from the store; `acknowledged`: those
    whose record the store has taken; `errors`, `warnings`: in words."""

    worked_on: list[str] = field(default_factory=list)
    acknowledged: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    outputs: dict[str, str] = field(default_factory=dict)

    @property
    def well(self) -> bool:
        return not self.errors


def attempt(recipe: Recipe, store: Store, begun: Callable[[str], None] = lambda fingerprint: None) -> Attempt:
    """Plan and run the recipe on a store, in this process. `begun` is told of each fingerprint that is worked on."""
    done = Attempt()

    def append_record(record: Any) -> None:
        Store.append_record(store, record)
        done.acknowledged.add(record.fingerprint)

    def run_stage(spec: dict[str, Any], *_: object, **__: object) -> StageResult:
        done.worked_on.append(spec["fingerprint"])
        begun(spec["fingerprint"])
        Path(spec["job"]).mkdir(parents=True)
        stages.__main__.run_spec(Spec(**spec))
        result = json.loads((Path(spec["job"]) / "result.json").read_text())
        return StageResult(**result, seconds=0.0, command=[])

    with (
        mock.patch.object(store, "append_record", append_record),
        mock.patch.object(flows.making, "run_stage_process", run_stage),
        mock.patch.object(stages.__main__, "open_store", lambda url: store),
        _heard(done.warnings),
    ):
        try:
            _run(recipe, store, done)
        except PosttrainError as error:
            done.errors.append(str(error))
    return done


@contextlib.contextmanager
def _heard(warnings: list[str]) -> Iterator[None]:
    """Collects what is warned of, and keeps it off the terminal."""
    handler, disabled = logging.Handler(logging.WARNING), logging.root.manager.disable
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("artifacts", "flows", "stages")]
    logging.disable(logging.NOTSET)
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        logging.disable(disabled)
        for logger in loggers:
            logger.propagate = True
            logger.removeHandler(handler)


def _run(recipe: Recipe, store: Store, done: Attempt) -> None:
    run = Run(plan(recipe, store))
    with run.supervisors:
        for name in run.pending():
            if (cause := run.blocked(name)) is not None:
                run.skip(name, cause)
                continue
            try:
                outcome = run.execute(name)
                done.outputs |= {output: found.id for output, found in outcome.outputs.items()}
            except PosttrainError as error:
                done.errors.append(str(error))
        run.finish()
