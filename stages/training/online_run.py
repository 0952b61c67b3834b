"""How stages that learn from one's own completions take their prompts, train on them and write what they made."""

from __future__ import annotations

import time
from typing import Any

from stages.context import Context
from stages.data.dataset import read_dataset
from stages.data.ledger import RowLedger
from stages.data.open_prompts import open_prompts
from stages.data.tokenize import TokenizedPrompt
from stages.training.export import export
from stages.training.held_out_rewards import held_out_rewards
from stages.training.loop import Trained, Trainer
from stages.training.objective import Windows
from stages.training.occupancy import utilization
from stages.training.rollout_export import write_rollouts
from stages.training.rollout_windows import RolloutWindows


def read_prompts(context: Context, trainer: Trainer, tokenizer: Any, ledger: RowLedger) -> list[TokenizedPrompt]:
    """Those of input `dataset` that leave room for a completion; the ledger says which do not."""
    dataset = read_dataset(context.input("dataset"))
    return open_prompts(context.config, dataset, tokenizer, trainer.scorer.context_length, ledger)


def train_on_rollouts(
    context: Context, trainer: Trainer, tokenizer: Any, windows: Windows, rollouts: RolloutWindows, ledger: RowLedger
) -> Trained:
    """Train on `windows`, which are made of `rollouts`, measure input `eval_dataset` meanwhile, and write the model and
    the rollouts."""
    context.counts["prompts"] = len(rollouts.drawing)
    measured = held_out_rewards(context, trainer, tokenizer, rollouts)
    started = time.monotonic()
    trained = trainer.run(windows, ledger.states, measured)
    context.timings |= utilization(context.timings, time.monotonic() - started)
    rollouts.drawing.note_unused(ledger)
    export(context, trained, ledger.to_json(), samples=rollouts.samples)
    if context.is_main:
        # a run may have ended early
        write_rollouts(context, rollouts.generations(int(trained.metrics[-1]["step"])))
    return trained
