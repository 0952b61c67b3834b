"""THE training loop: a window becomes one optimizer step. Every training stage runs through it.

The loss is a sum over items and is divided once, by the items of the whole window over all processes; so the
gradient does not depend on how a window is cut into micro-batches or spread over processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from accelerate import Accelerator

from artifacts.errors import StageError
from stages.context import Context
from stages.data.ledger import say_dropped
from stages.monitors import Notice, Watch, notices_of_rows
from stages.sharding import Whole
from stages.training import checkpoint, held_out
from stages.training.averaging import Averaging
from stages.training.config import TrainingConfig
from stages.training.held_out import Measured
from stages.training.keeping import Keeping
from stages.training.metrics_log import MetricsLog
from stages.training.micro_batches import backward, balance_loss
from stages.training.model import Scorer
from stages.training.not_finite import stop_on_nan
from stages.training.objective import Concluding, Objective, Remembering, Window, Windows
from stages.training.occupancy import clocked
from stages.training.out_of_memory import TokenBudget
from stages.training.parallel import PolicyCopy, copy_weights, spread
from stages.training.probes import scorers_in
from stages.training.processes import Processes, launched_sharding
from stages.training.reporting import Trackers, report_end, report_step
from stages.training.router_balance import AUX_LOSS, RouterBalance
from stages.training.schedule import Schedule
from stages.training.step_totals import measure
from stages.training.utilization import Utilization


@dataclass
class Trained:
    """What the loop leaves: the whole Scorer in float32 (on the first process), one row of metrics a step, the rows
    of every step."""

    scorer: Scorer | None
    metrics: list[dict[str, float]]
    rows: list[dict[str, Any]]

    @property
    def model(self) -> Any:
        """The trained model; None where there is no Scorer."""
        return None if self.scorer is None else self.scorer.model


class Trainer:
    """One run of the loop; holds what every step needs.

    `rebuild` makes the Scorer as it was before training. It is needed where the whole model in float32 is not at
    hand any more: for the export of a bfloat16 or sharded model, and for generation beside a sharded one.
    """

    def __init__(
        self,
        context: Context,
        config: TrainingConfig,
        accelerator: Accelerator,
        scorer: Scorer,
        objective: Objective,
        rebuild: Callable[[], Scorer] | None = None,
        balance: RouterBalance | None = None,
    ) -> None:
        self.context, self.config, self.accelerator = context, config, accelerator
        self.scorer, self.objective, self.rebuild, self.balance = scorer, objective, rebuild, balance
        self.metric_names = [*objective.metric_names, *(() if balance is None else (AUX_LOSS,))]
        self.processes, sharding = Processes.of(accelerator), launched_sharding()
        self.is_whole = isinstance(sharding, Whole)
        if rebuild is None and not (self.is_whole and not config.bf16):
            raise ValueError("training in bfloat16 or with a sharded model needs `rebuild`")
        models = [one.transformers_model for one in scorers_in(scorer)]
        for model in models if config.gradient_checkpointing else ():
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.budget = TokenBudget(context, config.micro_batch_tokens)
        self.utilization = Utilization.of(models, config.bf16)
        self.numerics = checkpoint.numerics(self.processes, sharding.name, config.micro_batch_tokens)
        self.parallel = spread(scorer, config, self.processes, sharding)
        self.saver = checkpoint.Saver(context, self.parallel, self.processes, config.checkpoint_steps)
        self.averaging = Averaging(config.weight_averaging, context, self.parallel, self.processes)
        self._copy: PolicyCopy | None = None
        self.steps_done = 0
        """Optimizer steps behind the present weights."""

    @property
    def weights_version(self) -> int:
        """A number for each weights that there are: the steps behind them; of averaged ones in their place below -1."""
        return -2 - self.steps_done if self.averaging.is_in_place else self.steps_done

    def policy(self) -> Scorer:
        """The whole model in this process, as it was at the beginning of the present window. Collective at first."""
        if self.is_whole:
            return self.scorer
        if self._copy is None:
            assert self.rebuild is not None
            self._copy = PolicyCopy(self.parallel, self.rebuild, self.processes.device, self.config.bf16)
        return self._copy.scorer

    def run(
        self,
        windows: Windows,
        states: Mapping[str, int] = MappingProxyType({}),
        measured: Measured | None = None,
    ) -> Trained:
        """Train to the end, from the newest saved state where there is one. `states`: the row ledger's; `measured`:
        rows that are not trained on."""
        context, total = self.context, windows.total_steps
        progress, keeping = self._take_up(windows, measured)
        watch, log = Watch(progress.metrics), MetricsLog(context, progress.metrics)
        say_dropped(context, states)
        self._say_unreached_rate(total)
        if progress.step == 0:
            self._give_notice(notices_of_rows(states))
        with Trackers(context, self.config) as trackers, self.saver.background:
            if measured is not None and measured.at_start and progress.step == 0:
                progress.metrics.append({"step": 0})
                self._measure_apart(measured, windows, keeping, progress.metrics[0])
                self._tell(progress.metrics[0], log, trackers, watch)
            for step in range(progress.step, total):
                if keeping.ends(step, total):
                    break
                started = time.monotonic()
                self.steps_done = step
                if self._copy is not None:
                    self._copy.refresh()
                row, ids = self.step(step, total, windows.window(step))
                self.averaging.after(step + 1)
                seconds, step_tokens = time.monotonic() - started, int(row["num_tokens"])
                if measured is not None and measured.is_due(step + 1, total):
                    self._measure_apart(measured, windows, keeping, row)
                progress.step = step + 1
                progress.num_tokens += step_tokens
                row["num_tokens"] = progress.num_tokens
                progress.metrics.append(row)
                progress.rows.append({"step": step + 1, "rows": ids})
                report_step(context, step + 1, total, row, seconds, step_tokens)
                self._tell(row, log, trackers, watch)
                if step + 1 < total and self.saver.is_due(step + 1):
                    self._save(progress, windows, keeping)
        report_end(context, keeping.row(progress.metrics), self.utilization)
        return Trained(self._whole(keeping), progress.metrics, keeping.trained(progress.rows))

    def _save(self, progress: checkpoint.Progress, windows: Windows, keeping: Keeping) -> None:
        asked = time.monotonic()
        progress.windows = windows.state()
        waited_seconds = time.monotonic() - asked
        if isinstance(self.objective, Remembering):
            progress.objective = self.objective.state()
        tensors = {**windows.tensors(), **keeping.tensors()}
        parts = self.averaging.tensors()
        self.saver.save(replace(progress, tensors=tensors, parts=parts), waited_seconds)

    def _take_up(self, windows: Windows, measured: Measured | None) -> tuple[checkpoint.Progress, Keeping]:
        """The newest saved state, or the beginning."""
        held_out.require_items(measured, self.objective)
        progress = checkpoint.restore(self.context, self.parallel, self.processes, self.numerics)
        keeping = Keeping(self.context, measured, self.parallel)
        tensors = self.averaging.load(progress.tensors, progress.step)
        windows.load(progress.windows, keeping.load(progress.metrics, tensors))
        progress.tensors = {}
        if isinstance(self.objective, Remembering):
            self.objective.load(progress.objective)
        total = windows.total_steps
        self.averaging.begin(progress.step, total, None if measured is None else measured.stops_every(total))
        return progress, keeping

    def step(self, step: int, total: int, window: Window) -> tuple[dict[str, float], list[str]]:
        """One optimizer step. Returns its row of metrics (num_tokens of this step alone) and its row ids."""
        config = self.config
        self.scorer.train()
        rate = config.learning_rate * Schedule.of(config).factor(step, total)
        items = sum(self.objective.count(group) for group in window.groups) + window.uncounted_items
        if items <= 0:
            raise StageError(f"step {step + 1} has nothing to learn from: every item of its rows is masked")
        sums = self.budget.fit(
            lambda tokens: backward(self, step, window.groups, items, tokens),
            drop=self.parallel.discard,
            alone=self.processes.size == 1,
        )
        totals, found, grad_norm = measure(self, sums)
        loss, tokens = totals.pop("loss")[0] / items + balance_loss(self, totals), int(totals.pop("num_tokens")[0])
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            stop_on_nan(self, step, window, loss, grad_norm)
        known = {"step": step + 1, "loss": loss, "grad_norm": grad_norm, "learning_rate": rate}
        means = {name: total / count for name, (total, count) in totals.items() if count != 0} | found
        if isinstance(self.objective, Concluding):
            means |= self.objective.concluded(means)
        self.parallel.step(rate)
        if window.num_tokens is not None:
            tokens = window.num_tokens
        return {**known, "num_tokens": tokens, **window.metrics, **means}, [group.row_id for group in window.groups]

    def _say_unreached_rate(self, total: int) -> None:
        if Schedule.of(self.config).warmup(total) == total:
            rate = self.config.learning_rate
            self.context.log(f"the learning rate rises over all {total} steps and does not reach {rate}")

    def _tell(self, row: dict[str, float], log: MetricsLog, trackers: Trackers, watch: Watch) -> None:
        log.add(row)
        trackers.log(row)
        self._give_notice(watch.look(row))

    def _measure_apart(self, rows: Measured, windows: Windows, keeping: Keeping, row: dict[str, float]) -> None:
        """Into the metrics of the step that is done, or of step 0, before the first."""
        self.steps_done = int(row["step"])
        with clocked(self.context.timings, held_out.SECONDS):
            with self.averaging.in_place():
                if self._copy is not None:
                    self._copy.refresh()
                found = rows.measure(self, windows)
                keeping.look({**row, **found})
        said = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        self.context.log(f"step {self.steps_done}: {said}")
        row |= found

    def _give_notice(self, notices: Sequence[Notice]) -> None:
        """Say what the monitors noticed, and stop where the recipe wants it."""
        for notice in notices:
            self.context.log(str(notice))
            if notice.monitor in self.config.stop_on:
                self.saver.background.wait()
                raise StageError(f"{notice} (stop_on names {notice.monitor})")

    def _whole(self, keeping: Keeping) -> Scorer | None:
        """The weights that are left, in float32, on the first process."""
        quantized = self.config.quantization is not None
        if self.rebuild is None or (self.is_whole and not self.config.bf16 and not quantized):
            target: Scorer | None = self.scorer
        else:
            target = self.rebuild() if self.context.is_main else None
            copy_weights(self.parallel, target)
        self.averaging.put_into(target)
        keeping.put_into(target)
        return target
