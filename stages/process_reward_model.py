"""A process reward model: judges every step of a solution, not only its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from stages.stage import Input, Stage
from stages.training.config import MeasuredConfig, check_measured
from stages.training.memory import training_step
from stages.training.memory_head import HeadUse
from stages.training.memory_phase import Phase
from stages.training.memory_request import Request
from stages.training.memory_shape import ModelShape

if TYPE_CHECKING:
    from stages.context import Context
    from stages.data.ledger import RowLedger
    from stages.data.steps import TokenizedSteps
    from stages.data.types import Dataset
    from stages.training.batch import Group


class Config(MeasuredConfig):
    """Settings of process reward model training."""

    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    step_separator: str = Field("\n", min_length=1)
    """Text after every step; its last token is where the step is judged."""
    train_on_last_step_only: bool = False
    """Learn the label of each row's last step alone (outcome supervision)."""
    max_length: int = Field(1024, gt=1)
    """Longest prompt with steps in tokens; steps that end beyond are cut off and counted in the ledger."""


def run(context: Context) -> None:
    """Train a fresh head of two outputs and the layers of input `model` on the steps of input `dataset`, and measure it
    on those of input `eval_dataset` meanwhile."""
    from stages.data.dataset import read_dataset
    from stages.data.ledger import RowLedger
    from stages.training.classifiers import load_step_judge
    from stages.training.export import export
    from stages.training.held_out import HeldOut
    from stages.training.process_reward import StepLoss, step_group
    from stages.training.start import start_classifier
    from stages.training.windows import DatasetWindows

    config: Config = context.config
    trainer, tokenizer = start_classifier(context, config, StepLoss(), load_step_judge)

    def groups_of(dataset: Dataset, ledger: RowLedger) -> list[Group]:
        rows = tokenized(config, dataset, tokenizer, trainer.scorer.context_length, ledger)
        return [step_group(row) for row in rows]

    ledger = RowLedger()
    groups = groups_of(read_dataset(context.input("dataset")), ledger)
    context.counts.update({"rows": len(groups), "steps": sum(len(group.data.ends) for group in groups)})
    held_out = HeldOut.of(context, trainer.scorer.vocabulary, groups_of, groups)
    trained = trainer.run(DatasetWindows(groups, config), ledger.states, held_out)
    export(context, trained, ledger.to_json())


def tokenized(
    config: Config, dataset: Dataset, tokenizer: Any, context_length: int, ledger: RowLedger
) -> list[TokenizedSteps]:
    """The steps after their prompt."""
    from stages.data.steps import tokenize_steps
    from stages.data.truncation import RowLimit

    return tokenize_steps(
        dataset,
        tokenizer,
        step_separator=config.step_separator,
        max_length=RowLimit.of(config.max_length, context_length),
        last_step_only=config.train_on_last_step_only,
        ledger=ledger,
    )


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
    version=4,
    config=Config,
    inputs={
        "model": Input(("model",)),
        "dataset": Input(("dataset",), types=("stepwise_supervision",)),
        "eval_dataset": Input(("dataset",), types=("stepwise_supervision",), required=False),
    },
    outputs={"model": "process_reward_model"},
    run=run,
    check=check_measured,
    summary="a process reward model from steps that were judged one by one",
    main_metric="accuracy",
    memory=memory,
    shapes=shapes,
    tokenized=tokenized,
)
