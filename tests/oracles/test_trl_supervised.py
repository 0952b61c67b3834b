"""A whole step of supervised fine-tuning and of reward modelling, against TRL's trainers on the same model and rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from stages.losses.supervised import SUPERVISED_LOSSES
from stages.training.batch import Branch, Group, layout
from stages.training.language_modeling import EmbeddingNoise, RowSettings, TokenLoss
from stages.training.pairs import RewardLoss
from tests.oracles.steps import Step, agree, gradient_norm, logged, trainer_of
from tests.training.conftest import packing_scorer, random_groups, tiny_model

trl = pytest.importorskip("trl", reason="the oracle is an extra: pip install -e '.[benchmarks]'")


def step_of(objective: Any, model: torch.nn.Module, groups: list[Group]) -> Step:
    scorer = packing_scorer(model)
    loss, metrics = objective(scorer, scorer.layout(groups))
    items = sum(objective.count(group) for group in groups)
    means = {name: float(one.sum) / float(one.count) for name, one in metrics.items()}
    return Step(float(loss.detach()) / items, gradient_norm(model, loss / items), means)


@pytest.mark.parametrize("name", SUPERVISED_LOSSES)
def test_sft(tmp_path: Path, name: str) -> None:
    """Prompts not trained; the mean is over the tokens of all rows."""
    model, groups = tiny_model(), random_groups(6, 1)
    rows = [
        {
            "input_ids": [*group.prefix_ids, *group.branches[0].token_ids],
            "labels": [-100] * len(group.prefix_ids) + list(group.branches[0].token_ids),
        }
        for group in groups
    ]
    trainer = trainer_of(tmp_path, trl.SFTTrainer, trl.SFTConfig, model, {"loss_type": name}, rows)
    model.train()
    loss = trainer.compute_loss(model, trainer.data_collator(rows))
    theirs = Step(float(loss.detach()), gradient_norm(model, loss), logged(trainer))
    agree(step_of(TokenLoss(SUPERVISED_LOSSES[name].function), model, groups), theirs)
    assert theirs.metrics["num_tokens"] == packing_scorer(model).layout(groups).num_tokens


def test_noise_differs_by_padding() -> None:
    """NEFTune: uniform within alpha / sqrt(length x hidden) of the row's own length; of the padded batch's in
    transformers, whose hook TRL uses."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    alpha, hidden, lengths = 5.0, 32, (4, 8)
    groups = [
        Group(f"row{length}", (7,), (Branch([7] * (length - 1)),), RowSettings(noise_key=(3, "neftune", length)))
        for length in lengths
    ]
    torch.manual_seed(0)
    module = SimpleNamespace(training=True, neftune_noise_alpha=alpha)
    theirs = neftune_post_forward_hook(module, None, torch.zeros(2, max(lengths), hidden))
    ours = EmbeddingNoise(layout(groups), alpha)(torch.zeros(1, sum(lengths), hidden))[0].split(lengths)
    for row, length in enumerate(lengths):
        own, padded = (alpha / (size * hidden) ** 0.5 for size in (length, max(lengths)))
        assert 0.9 * own < float(ours[row].abs().max()) <= own
        assert 0.9 * padded < float(theirs[row, :length].abs().max()) <= padded


def tiny_classifier() -> torch.nn.Module:
    """The tiny Llama with a score in place of its head."""
    base = tiny_model()
    config = AutoConfig.for_model(**{**base.config.to_dict(), "num_labels": 1, "pad_token_id": 0})
    torch.manual_seed(7)
    model: torch.nn.Module = AutoModelForSequenceClassification.from_config(config)
    shared = {name: value for name, value in base.state_dict().items() if "lm_head" not in name}
    model.load_state_dict(shared, strict=False)
    return model.eval()


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("center", [0.0, 0.05])
def test_reward_model(tmp_path: Path, margins: bool, center: float) -> None:
    model = tiny_classifier()
    given = random_groups(6, 2)
    groups = [replace(group, data=0.25 * index if margins else None) for index, group in enumerate(given)]
    rows: list[dict[str, Any]] = []
    for group in groups:
        chosen, rejected = ([*group.prefix_ids, *branch.token_ids] for branch in group.branches)
        row = {"chosen_ids": chosen, "rejected_ids": rejected}
        rows.append(row | ({"margin": group.data} if margins else {}))
    fields = {"center_rewards_coefficient": center or None}
    trainer = trainer_of(tmp_path, trl.RewardTrainer, trl.RewardConfig, model, fields, rows)
    model.train()
    loss = trainer.compute_loss(model, trainer.data_collator(rows))
    theirs = Step(float(loss.detach()), gradient_norm(model, loss), logged(trainer))
    agree(step_of(RewardLoss(center), model, groups), theirs)
