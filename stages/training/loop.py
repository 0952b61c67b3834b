"""THE training loop: a window becomes one optimizer step. Every training stage runs through it.

The loss is a sum over items and is divided once, by the items of the whole window over all processes; so the
gradient does not depend on how a window is cut into micro-batches or spread over processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from artifacts.errors import StageError
from stages.context import Context
from stages.seeds import derive
from stages.training import checkpoint
from stages.training.batch import Group, plan_micro_batches
from stages.training.config import TrainingConfig
from stages.training.metrics import MetricSums
from stages.training.model import Scorer
from stages.training.objective import Objective, Window, Windows
from stages.training.optimizer import build_optimizer
from stages.training.out_of_memory import TokenBudget
from stages.training.planner import share_of_rank
from stages.training.schedule import learning_rate


def prepare_process(context: Context, bf16: bool = False) -> Accelerator:
    """Deterministic algorithms, a fixed number of threads, and the process group."""
    if context.threads is not None:
        torch.set_num_threads(context.threads)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    accelerator = Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=1,
    )
    if accelerator.num_processes != context.processes:
        raise StageError(f"{context.processes} processes were asked for, {accelerator.num_processes} found each other")
    return accelerator


@dataclass
class Trained:
    """What the loop leaves: the trained Scorer, one row of metrics a step, the rows of every step."""

    scorer: Scorer
    metrics: list[dict[str, float]]
    rows: list[dict[str, Any]]


class Trainer:
    """One run of the loop; holds what every step needs."""

    def __init__(
        self, context: Context, config: TrainingConfig, accelerator: Accelerator, scorer: Scorer, objective: Objective
    ) -> None:
        self.context, self.config, self.accelerator = context, config, accelerator
        self.scorer, self.objective = scorer, objective
        scorer.to(accelerator.device)
        if config.gradient_checkpointing:
            scorer.transformers_model.gradient_checkpointing_enable({"use_reentrant": False})
        self.budget = TokenBudget(context, config.micro_batch_tokens)
        self.optimizer = build_optimizer(scorer, config)
        self.parameters = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
        self.wrapped: nn.Module = accelerator.prepare_model(scorer)

    def run(self, windows: Windows) -> Trained:
        """Train to the end, from the newest saved state where there is one."""
        context, total = self.context, windows.total_steps
        numerics = checkpoint.numerics(torch.get_num_threads(), context.processes, self.config.micro_batch_tokens)
        progress = checkpoint.restore(context, self.scorer, self.optimizer, numerics)
        windows.load(progress.windows)
        clock = checkpoint.SaveClock(self.config.checkpoint_steps)
        with Trackers(context, self.config) as trackers:
            for step in range(progress.step, total):
                started = time.monotonic()
                row, ids = self.step(step, total, windows.window(step))
                step_tokens = int(row["num_tokens"])
                progress.step = step + 1
                progress.num_tokens += step_tokens
                row["num_tokens"] = progress.num_tokens
                progress.metrics.append(row)
                progress.rows.append({"step": step + 1, "rows": ids})
                self._report(step + 1, total, row, time.monotonic() - started, step_tokens)
                trackers.log(row)
                if context.is_main and step + 1 < total and clock.due(step + 1):
                    progress.windows, before = windows.state(), time.monotonic()
                    checkpoint.save(context, self.scorer, self.optimizer, progress)
                    clock.saved(time.monotonic() - before)
        self._finish(progress)
        return Trained(self.scorer, progress.metrics, progress.rows)

    def step(self, step: int, total: int, window: Window) -> tuple[dict[str, float], list[str]]:
        """One optimizer step. Returns its row of metrics (num_tokens of this step alone) and its row ids."""
        config = self.config
        self.wrapped.train()
        rate = learning_rate(
            step, total, peak=config.learning_rate, schedule=config.lr_scheduler_type, warmup_ratio=config.warmup_ratio
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        items = sum(self.objective.count(group) for group in window.groups) + window.uncounted_items
        if items <= 0:
            raise StageError(f"step {step + 1} has nothing to learn from: every item of its rows is masked")
        metrics, num_tokens = self.budget.fit(
            lambda tokens: self.backward(step, window.groups, items, tokens),
            drop=lambda: self.optimizer.zero_grad(set_to_none=True),
            alone=self.accelerator.num_processes == 1,
        )
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm or math.inf)
        grad_norm = float(norm)
        if not math.isfinite(metrics["loss"]) or not math.isfinite(grad_norm):
            self._stop_on_nan(step, window, metrics["loss"], grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        known = {"step": step + 1, "loss": metrics.pop("loss"), "grad_norm": grad_norm, "learning_rate": rate}
        tokens = num_tokens if window.num_tokens is None else window.num_tokens
        return {**known, "num_tokens": tokens, **window.metrics, **metrics}, [group.row_id for group in window.groups]

    def backward(
        self, step: int, groups: Sequence[Group], items: float, budget_tokens: int
    ) -> tuple[dict[str, float], int]:
        """Accumulate the gradient of summed loss / items over this process's share; metrics over all processes."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        plan = plan_micro_batches(groups, budget_tokens, self.scorer.share_prefixes, least=world)
        mine = share_of_rank([sum(groups[i].length for i in batch) for batch in plan], rank, world)
        rounds = max(1, -(-len(plan) // world)) if plan else 0
        sums, loss_sum, num_tokens = MetricSums(), torch.zeros((), dtype=torch.float64), 0
        for turn in range(rounds):
            # A process that has no batch left takes part with a copy whose loss is zero: gradients are exchanged
            # in the backward pass, so every process needs one.
            real = turn < len(mine)
            index = mine[turn] if real else 0
            torch.manual_seed(derive(self.config.seed, "dropout", step, index))
            together = [groups[i] for i in plan[index]]
            unsynced = turn < rounds - 1 and world > 1
            with self.budget.micro_batch(together), self.accelerator.no_sync(self.wrapped) if unsynced else nullcontext():
                batch = self.scorer.layout(together)
                loss, metrics = self.objective(self.wrapped, batch)
                # gradients are averaged over processes; undo that, so that `items` is the only divisor
                self.accelerator.backward(loss * (world / items if real else 0.0))
            if real:
                sums.add(metrics)
                loss_sum += loss.detach().double().cpu()
                num_tokens += batch.num_tokens
        reduced = sums.reduce(list(self.objective.metric_names), self._sum_over_processes)
        totals = self._sum_over_processes(torch.stack([loss_sum, torch.tensor(float(num_tokens), dtype=torch.float64)]))
        return {"loss": float(totals[0]) / items, **reduced}, int(totals[1])

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values
        moved = self.accelerator.reduce(values.to(self.accelerator.device), "sum")
        assert isinstance(moved, Tensor)
        return moved.cpu()

    def _stop_on_nan(self, step: int, window: Window, loss: float, grad_norm: float) -> None:
        """Find the rows by computing them one by one, and stop before the weights are touched."""
        self.wrapped.eval()
        self.optimizer.zero_grad(set_to_none=True)
        culprits = [group.row_id for group in window.groups if not self._is_finite(group)]
        rows = f"rows {', '.join(culprits[:8])}" if culprits else "no row alone (their sum overflowed)"
        if len(culprits) > 8:
            rows += f" and {len(culprits) - 8} more"
        saved = self.context.checkpoints.latest_step()
        kept = "no checkpoint was saved before" if saved is None else f"the last checkpoint is of step {saved}"
        raise StageError(
            f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; {rows}. This step changed no weights, and "
            f"{kept}; lower learning_rate or look at these rows"
        )

    def _is_finite(self, group: Group) -> bool:
        """Whether loss and gradient of the group alone are numbers."""
        loss, _ = self.objective(self.scorer, self.scorer.layout([group]))
        if not math.isfinite(float(loss.detach())):
            return False
        # not backward(): that would exchange gradients with the other processes
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True) if loss.requires_grad else ()
        return all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)

    def _report(self, step: int, total: int, row: dict[str, float], seconds: float, tokens: int) -> None:
        self.context.step_timings.append({"step": step, "seconds": seconds, "tokens": tokens})
        shown = {key: value for key, value in row.items() if key in _SHOWN}
        shown["tokens_per_second"] = tokens / max(seconds, 1e-9)
        self.context.progress(step, total, "step", shown)

    def _finish(self, progress: checkpoint.Progress) -> None:
        context, timed = self.context, self.context.step_timings
        context.metrics.update(progress.metrics[-1])
        if timed:
            seconds = [entry["seconds"] for entry in timed]
            context.timings["median_step_time"] = median(seconds)
            context.timings["tokens_per_second"] = sum(entry["tokens"] for entry in timed) / max(sum(seconds), 1e-9)
        context.timings["peak_memory_gb"] = peak_memory_gb()


def peak_memory_gb() -> float:
    """Peak of this process: allocated on the GPU, or resident on a CPU."""
    import resource

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


_SHOWN = ("loss", "reward", "rewards/accuracies", "accuracy")
"""Metrics that go into progress lines."""


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
            self.accelerator.end_training()
