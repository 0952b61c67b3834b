"""What a training run tells while it runs: progress lines, timings, trackers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator

from stages.context import Context
from stages.training.config import TrainingConfig
from stages.training.utilization import Utilization

_SHOWN = ("loss", "reward", "rewards/accuracies", "accuracy")
"""Metrics that go into progress lines."""


def report_step(context: Context, step: int, total: int, row: Mapping[str, float], seconds: float, tokens: int) -> None:
    """A progress line, and the step's time for `timings.jsonl`."""
    context.step_timings.append({"step": step, "seconds": seconds, "tokens": tokens})
    shown = {key: value for key, value in row.items() if key in _SHOWN}
    shown["tokens_per_second"] = tokens / max(seconds, 1e-9)
    context.progress(step, total, "step", shown)


def report_end(context: Context, last_row: Mapping[str, float], utilization: Utilization) -> None:
    """The last metrics, and times over the whole run."""
    context.metrics.update(last_row)
    if timed := context.step_timings:
        seconds = [entry["seconds"] for entry in timed]
        tokens, total = sum(entry["tokens"] for entry in timed), sum(seconds)
        context.tokens += tokens
        context.timings["median_step_time"] = median(seconds)
        context.timings["tokens_per_second"] = tokens / max(total, 1e-9)
        context.timings |= utilization.measure(tokens, total, context.processes)
    context.timings["peak_memory_gb"] = peak_memory_gb()


def peak_memory_gb() -> float:
    """Peak of this process: allocated on the GPU, or resident on a CPU."""
    import resource

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Trackers:
    """TensorBoard, Weights & Biases and the like, through accelerate; metrics.jsonl does not depend on them."""

    def __init__(self, context: Context, config: TrainingConfig) -> None:
        self.names = list(config.report_to) if context.is_main else []
        self.context, self.config = context, config
        self.accelerator: Accelerator | None = None

    def __enter__(self) -> Trackers:
        if self.names:
            self.accelerator = Accelerator(
                log_with=self.names, project_dir=str(Path(self.context.spec.job) / "trackers")
            )
            settings = {
                key: value for key, value in self.config.model_dump().items() if isinstance(value, int | float | str)
            }
            self.accelerator.init_trackers(f"posttrain-{self.context.spec.recipe}", config=settings)
        return self

    def log(self, row: dict[str, float]) -> None:
        """Send one row of metrics."""
        if self.accelerator is not None:
            values = {f"{self.context.spec.name}/{key}": value for key, value in row.items()}
            self.accelerator.log(values, step=int(row["step"]))

    def __exit__(self, *_: object) -> None:
        if self.accelerator is not None:
            # not its end_training(): that takes the process group away, which the export of a sharded model needs
            for tracker in self.accelerator.trackers:
                tracker.finish()
