"""A reward model: a score for a completion, trained so that chosen ones score above rejected ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from stages.data.pairs import pairs_of
from stages.data.types import PAIRED
from stages.stage import Input, Stage
from stages.training.config import MeasuredConfig, check_measured
from stages.training.length_settings import CompletionLengthConfig
from stages.training.memory import training_step
from stages.training.memory_head import HeadUse
from stages.training.memory_phase import Phase
from stages.training.memory_request import Request
from stages.training.memory_shape import ModelShape

if TYPE_CHECKING:
    from stages.context import Context
    from stages.data.ledger import RowLedger
    from stages.data.types import Dataset
    from stages.training.batch import Group


class Config(CompletionLengthConfig, MeasuredConfig):
    """Settings of reward-model training."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    center_rewards_coefficient: float = Field(0.0, ge=0)
    """Weight of the term that keeps the scores of a pair centred at zero."""


def run(context: Context) -> None:
    """Train a fresh scalar head and the layers of input `model` on the pairs of input `dataset`, and measure it on
    those of input `eval_dataset` meanwhile."""
    from stages.data.dataset import read_dataset
    from stages.data.given_tokens import require_vocabulary
    from stages.data.ledger import RowLedger
    from stages.training.classifiers import load_reward_model
    from stages.training.export import export
    from stages.training.held_out import HeldOut
    from stages.training.pairs import RewardLoss, pair_group
    from stages.training.start import start_classifier
    from stages.training.windows import DatasetWindows

    config: Config = context.config
    objective = RewardLoss(config.center_rewards_coefficient)
    trainer, tokenizer = start_classifier(context, config, objective, load_reward_model)

    def groups_of(dataset: Dataset, ledger: RowLedger) -> list[Group]:
        pairs = pairs_of(config, dataset, tokenizer, trainer.scorer.context_length, ledger)
        return [pair_group(pair, pair.margin) for pair in pairs]

    ledger, vocabulary = RowLedger(), trainer.scorer.vocabulary
    groups = groups_of(require_vocabulary(read_dataset(context.input("dataset")), vocabulary), ledger)
    context.counts["pairs"] = len(groups)
    held_out = HeldOut.of(context, vocabulary, groups_of, groups)
    trained = trainer.run(DatasetWindows(groups, config), ledger.states, held_out)
    export(context, trained, ledger.to_json())


def memory(request: Request) -> list[Phase]:
    """One step after another; only last tokens are read. A pair may share no token."""
    rows = request.config.train_batch_size
    work = request.passes(row=2 * request.longest, rows=rows, read=2 * rows)
    training = replace(request.training, shape=request.model.as_classifier())
    return [training_step(training, work, HeadUse())]


def shapes(_: Config, models: Mapping[str, ModelShape]) -> dict[str, ModelShape]:
    """A score in place of the head."""
    return {"model": models["model"].as_classifier()}


STAGE = Stage(
    name="reward_model",
    version=4,
    config=Config,
    inputs={
        "model": Input(("model",)),
        "dataset": Input(("dataset",), types=PAIRED),
        "eval_dataset": Input(("dataset",), types=PAIRED, required=False),
    },
    outputs={"model": "reward_model"},
    run=run,
    check=check_measured,
    summary="a Bradley-Terry reward model from preference pairs",
    main_metric="accuracy",
    memory=memory,
    shapes=shapes,
    tokenized=pairs_of,
)
