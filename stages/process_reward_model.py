"""A process reward model: judges every step of a solution, not only its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from stages.stage import Input, Stage
from stages.training.config import TrainingConfig
from stages.training.memory import Phase, Request, training_step
from stages.training.memory_head import HeadUse
from stages.training.memory_shape import ModelShape

if TYPE_CHECKING:
    from stages.context import Context


class Config(TrainingConfig):
    """Settings of process reward model training."""

    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate of AdamW."""
    step_separator: str = Field("\n", min_length=1)
    """Text after every step; its last token is where the step is judged."""
    train_on_last_step_only: bool = False
    """Learn the label of each row's last step alone (outcome supervision)."""
    max_length: int = Field(1024, gt=1)
    """Longest prompt with steps in tokens; steps that end beyond are cut off and counted in the ledger."""


def run(context: Context) -> None:
    """Train a fresh head of two outputs and the layers of input `model` on the steps of input `dataset`."""
    from stages.data.dataset import read_dataset
    from stages.data.ledger import RowLedger
    from stages.data.steps import tokenize_steps
    from stages.data.truncation import RowLimit
    from stages.training.classifiers import load_step_judge
    from stages.training.export import export
    from stages.training.start import start_classifier
    from stages.training.steps import StepLoss, step_group
    from stages.training.windows import DatasetWindows

    config: Config = context.config
    trainer, tokenizer = start_classifier(context, config, StepLoss(), load_step_judge)
    ledger = RowLedger()
    rows = tokenize_steps(
        read_dataset(context.input("dataset")),
        tokenizer,
        step_separator=config.step_separator,
        max_length=RowLimit.of(config.max_length, trainer.scorer.context_length),
        last_step_only=config.train_on_last_step_only,
        ledger=ledger,
    )
    context.counts.update({"rows": len(rows), "steps": sum(len(row.ends) for row in rows)})
    windows = DatasetWindows([step_group(row) for row in rows], config)
    trained = trainer.run(windows, ledger.states)
    export(context, trained, ledger.to_json())


def memory(request: Request) -> list[Phase]:
    """One step after another; few positions are read."""
    work = request.passes(row=request.longest, rows=request.config.train_batch_size)
    training = replace(request.training, shape=request.model.as_classifier())
    return [training_step(training, work, HeadUse())]


def shapes(_: Config, models: Mapping[str, ModelShape]) -> dict[str, ModelShape]:
    """Two outputs in place of the head."""
    return {"model": models["model"].as_classifier()}


STAGE = Stage(
    name="process_reward_model",
    version=3,
    config=Config,
    inputs={"model": Input(("model",)), "dataset": Input(("dataset",))},
    outputs={"model": "process_reward_model"},
    run=run,
    summary="a process reward model from steps that were judged one by one",
    main_metric="accuracy",
    memory=memory,
    shapes=shapes,
)
