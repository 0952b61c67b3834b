"""A stage's result made by its process: the slots it waits for, its tries, and what those before it took in vain."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.attempts import earlier_seconds, timed
from flows.decision import Decision
from flows.job import spec_of
from flows.launch import run_stage_process
from flows.plan import Plan
from flows.recipe import RecipeStage
from flows.retries import with_retries
from flows.sharing import Occupy
from flows.stage_result import Event, StageFailed, StageResult
from flows.supervisors import Supervisors
from flows.within_memory import within_memory


@dataclass(frozen=True)
class Made:
    """What a stage's process left."""

    result: StageResult
    job: Path
    """Its folder."""
    in_vain: tuple[float, ...]
    """Seconds of each attempt before that gave nothing."""

    def tidy(self) -> None:
        """Drop the large parts of the folder; its spec, events and log stay."""
        for path in [self.job / "out", *self.job.glob("scratch-*")]:
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Maker:
    """Makes results for one run."""

    plan: Plan
    run_id: str
    supervisors: Supervisors
    beside: int
    """How many stages may run at once."""

    def make(self, stage: RecipeStage, decision: Decision, occupy: Occupy, tell: Callable[[Event], None]) -> Made:
        """Runs the stage's process, again where that may help. Raises StageFailed."""
        spec = spec_of(self.plan, stage, decision, self.run_id, beside=self.beside)
        store, launch, stopping = self.plan.store, stage.launch, self.supervisors.stopping
        if stage.name in self.plan.selection.forced:
            store.checkpoints(spec["fingerprint"]).clear()
            store.shards(spec["fingerprint"]).clear()
        in_vain: list[float] = []

        def start(spec: dict[str, Any]) -> StageResult:
            with timed(in_vain, StageFailed):
                return run_stage_process(
                    spec,
                    launch,
                    tell,
                    on_warning=lambda line: tell({"kind": "warning", "text": line}),
                    supervisors=self.supervisors,
                )

        def start_within_memory() -> StageResult:
            return within_memory(spec, start, tell)

        with occupy(launch.slots, stopping, lambda text: tell({"kind": "log", "text": text})):
            result = with_retries(start_within_memory, launch.retries, launch.retry_delay_seconds, stopping, tell)
        job = Path(spec["job"])
        if result.resumed_from is not None:
            in_vain += earlier_seconds(store.scratch.absolute(), spec["fingerprint"], job)
        return Made(result, job, tuple(in_vain))
