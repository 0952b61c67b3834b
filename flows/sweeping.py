"""A sweep that runs: which trials have begun and how they ended. Knows no Prefect."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from artifacts.errors import PosttrainError
from flows.known_failures import KnownFailures
from flows.listener import Listener, Silence
from flows.run import Run
from flows.standings import Payload, Row, Standings, judged_by, ranked, row_of
from flows.sweep import Sweep
from flows.trial import Trial
from flows.which_run import seconds_in_all, starts

logger = logging.getLogger(__name__)


class SweepListener(Protocol):
    """What wants to know how a sweep goes on. Called from several threads."""

    def listener(self, trial: Trial) -> Listener:
        """Who listens to the run of a trial."""

    def ended(self, trial: Trial, standings: Standings) -> None:
        """A trial is over; how all stand now."""

    def finished(self, payload: Mapping[str, Any], standings: Standings) -> None:
        """The sweep is over, well or not."""


class SilentSweep:
    """The listener that does nothing."""

    def listener(self, trial: Trial) -> Listener:
        return Silence()

    def ended(self, trial: Trial, standings: Standings) -> None: ...
    def finished(self, payload: Mapping[str, Any], standings: Standings) -> None: ...


class Sweeping:
    """The state of a sweep. Trials run in threads, which see neither Ctrl-C nor SIGTERM; `stop` is for the main one."""

    def __init__(self, sweep: Sweep, listener: SweepListener | None = None) -> None:
        self.sweep = sweep
        self.listener = listener or SilentSweep()
        self.runs: dict[int, Run] = {}
        """Of trials that have begun."""
        self._ended: dict[int, Payload] = {}
        self._errors: dict[int, str] = {}
        self._failures = KnownFailures()
        before = starts(sweep.store, sweep.name)
        self._before = {
            trial.number: seconds_in_all(before, trial.to_json()["settings"], trial.plan.recipe.text)
            for trial in sweep.trials
        }
        """What each trial took when the sweep was started before."""
        self.stopped = False
        """No trial begins any more."""
        self._lock = threading.Lock()

    def begin(self, trial: Trial) -> Run:
        """The run of a trial whose turn has come."""
        with self._lock:
            run = Run(trial.plan, self.listener.listener(trial), trial=trial, failures=self._failures)
            self.runs[trial.number] = run
            if self.stopped:
                run.stop()
        return run

    def end(self, trial: Trial, error: Exception | None) -> None:
        """A trial is over; `error` is what kept its run as a whole from going on."""
        if error is not None:
            unforeseen = not isinstance(error, PosttrainError)
            self._errors[trial.number] = f"{type(error).__name__}: {error}" if unforeseen else str(error)
            if unforeseen:
                logger.error("trial %s failed", trial.label, exc_info=error)
        if (run := self.runs.get(trial.number)) is not None:
            self._ended[trial.number] = run.finish()

    def stop(self) -> None:
        """End all runs, and let none begin any more."""
        with self._lock:
            self.stopped = True
            for run in self.runs.values():
                run.stop()

    def is_done(self) -> bool:
        """Whether all trials have ended well."""
        return {row.state for row in self.standings().rows} == {"ok"}

    def standings(self) -> Standings:
        """All trials as they are now, those whose turn has not come as well."""
        ranking = self.sweep.trials[0].ranking
        payloads = {number: self._ended.get(number) or run.payload() for number, run in dict(self.runs).items()}
        metric = judged_by(ranking, payloads.values())
        rows = [self._row(trial, payloads.get(trial.number), metric) for trial in self.sweep.trials]
        return ranked(ranking, metric, rows, [axis.name for axis in self.sweep.axes])

    def payload(self) -> dict[str, Any]:
        """The sweep as `posttrain sweep --json` has it."""
        cut = "interrupted" if self.stopped else "failed"
        return {
            "sweep": self.sweep.name,
            "recipe": self.sweep.recipe,
            "state": "ok" if self.is_done() else cut,
            **self.standings().to_json(),
        }

    def _row(self, trial: Trial, payload: Payload | None, metric: str | None) -> Row:
        error = self._errors.get(trial.number)
        if payload is None:
            state = "waiting" if error is None else "failed"
            return Row(state, trial.values, trial=trial.number, error=error, command=trial.to_json()["command"])
        row = row_of(payload, trial.values, () if metric is None else (metric,))
        going = trial.number not in self._ended
        seconds = None if row.seconds is None else row.seconds + self._before[trial.number]
        return replace(row, state="running" if going else row.state, error=error or row.error, seconds=seconds)


def run_sweep(sweep: Sweep, listener: SweepListener | None = None) -> dict[str, Any]:
    """Run the trials and give the sweep's payload; its `state` is `failed` where a trial failed.

    Called inside a Prefect flow, the sweep is a subflow of it. Raises as `run_pipeline` does.
    """
    from flows.pipeline import prefect_at_hand

    going = Sweeping(sweep, listener)
    with prefect_at_hand() as settle:
        from flows.prefect_sweep import run_trials

        try:
            run_trials(going)
        finally:
            payload = going.payload()
            if going.runs:
                going.listener.finished(payload, going.standings())
        for run in going.runs.values():
            settle(run)
    return payload
