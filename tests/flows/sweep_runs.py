"""A sweep whose runs are written into a real store by hand, for its page: sft for all, a dpo and a judge a trial."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from artifacts import Store
from tests.flows.report_run import SmallRun, jsonl

STEPS = 8


class SmallSweep:
    """Trials are added in their order; `store` holds what they made."""

    def __init__(self, folder: Path, of: int, metric: str = "judge.accuracy", best: str | None = None) -> None:
        self.made = SmallRun(folder)
        self.of = of
        stage, _, name = metric.partition(".")
        self.ranking = {"stage": stage, "metric": name, "best": best}
        self.runs: list[dict[str, Any]] = []
        rows = {"dataset.json": json.dumps({"type": "preference"}), "data.parquet": "rows"}
        self.made.stage("rows", "normalize", {}, {"train": ("dataset", rows)})
        curve = [{"step": step, "loss": 1 / step, "learning_rate": 1e-5} for step in range(1, STEPS + 1)]
        trained = {"config.json": "{}", "metrics.jsonl": jsonl(curve)}
        self.made.stage("sft", "sft", {"dataset": "rows"}, {"model": ("model", trained)}, metrics={"loss": 1 / STEPS})

    @property
    def store(self) -> Store:
        return self.made.store

    def trial(
        self,
        settings: Mapping[str, Any],
        metrics: Mapping[str, Any],
        losses: Sequence[float],
        *,
        state: str = "ok",
        seconds: float = 10.0,
        error: str | None = None,
    ) -> dict[str, Any]:
        """`metrics`: of its evaluation; `losses`: its dpo's, one a step. `error`: of its dpo, which made nothing."""
        number = len(self.runs) + 1
        config = {name.removeprefix("dpo."): value for name, value in settings.items()}
        rows = [{"step": step, "loss": loss, "rewards/margins": -loss} for step, loss in enumerate(losses, start=1)]
        model = {"config.json": "{}", "metrics.jsonl": jsonl(rows), "trial": str(number)}
        outputs: dict[str, Any] = {} if error else {"model": ("model", model)}
        failed = {"state": "failed", "error": error} if error else {}
        self.made.stage("dpo", "preference", {"model": "sft"}, outputs, config, metrics={}, **failed)
        if not error:
            results = {"results.json": json.dumps({}), "trial": str(number)}
            given = {"evaluation": ("evaluation", results)}
            self.made.stage("judge", "evaluate", {"model": "dpo", "dataset": "rows"}, given, metrics=dict(metrics))
        return self.keep(number, settings, state, seconds)

    def keep(self, number: int, settings: Mapping[str, Any], state: str, seconds: float) -> dict[str, Any]:
        """Writes a run of the trial with the stages as they are."""
        run = f"20260101-{len(self.runs):06}-mine-{len(self.runs):06x}"
        text = yaml.safe_dump({"name": "small", "stages": self.made.recipe}, sort_keys=False)
        payload = {
            "run": run,
            "recipe": "small",
            "sweep": {
                "name": "mine",
                "trial": number,
                "trials": self.of,
                "settings": dict(settings),
                "varied": list(settings),
                "ranking": self.ranking,
                "command": f"posttrain run small --set trial={number}",
            },
            "state": state,
            "seconds": seconds,
            "started_at": f"2026-01-01T01:02:{len(self.runs):02}+00:00",
            "recipe_yaml": text,
            "stages": {name: dict(entry) for name, entry in self.made.stages.items()},
        }
        self.store.write_run(run, payload)
        self.runs.append(payload)
        for name in ("dpo", "judge"):
            self.made.stages.pop(name, None)
        return payload


def interval(value: float, half: float) -> dict[str, float]:
    """accuracy with its interval, as an evaluation records it."""
    return {"accuracy": value, "accuracy/low": value - half, "accuracy/high": value + half}
