"""The preference objective and its variants against losses written out on logits of separate rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.context import Context, local_context
from stages.losses.f_divergence import forward_kl
from stages.losses.pair_logprobs import PairLogprobs
from stages.losses.preference import PREFERENCE_LOSSES, weighted
from stages.preference import Config
from stages.training.batch import Group
from stages.training.following import Following
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.pair_windows import CoupledWindows, FollowingReference
from stages.training.pairs import Reference, sum_of_tokens
from stages.training.preference import PairSettings, PreferenceLoss
from stages.training.processes import prepare_process
from stages.training.reference import pair_references
from stages.training.windows import DatasetWindows
from tests.training.conftest import packing_scorer, random_groups, tiny_model
from tests.training.test_objectives import agree, plain_logits, plain_logprobs, targets


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(tiny_model().double())


def groups_of(count: int, branches: int = 2) -> list[Group]:
    return [replace(group, data=Reference(-9.0 - i, -8.0)) for i, group in enumerate(random_groups(count, branches))]


def log_ratio(sums: list[Tensor], index: int) -> tuple[Tensor, Tensor]:
    """Of chosen and rejected, against the references of `groups_of`."""
    return sums[2 * index] + 9.0 + index, sums[2 * index + 1] + 8.0


def test_several_losses_and_a_divergence(scorer: Scorer) -> None:
    groups, rows = groups_of(3), plain_logprobs(scorer, groups_of(3))
    expected, parts = torch.zeros((), dtype=torch.float64), []
    for index in range(3):
        chosen, rejected = log_ratio([row.sum() for row in rows], index)
        margin = (1 - (-chosen).exp()) - (1 - (-rejected).exp())
        parts.append(-(0.3 * margin).sigmoid().log())
        expected = expected + 2.0 * parts[-1] - 0.25 * rows[2 * index].mean()
    loss = weighted(["sigmoid", "sft"], [2.0, 0.25], {"beta": 0.3})
    metrics = {"losses/sigmoid": PREFERENCE_LOSSES["sigmoid"].with_settings({"beta": 0.3})}
    settings = PairSettings(0.3, divergence=forward_kl, metrics=metrics)
    found = agree(scorer, PreferenceLoss(loss, settings), groups, expected)
    assert found["losses/sigmoid"] == pytest.approx(float(torch.stack(parts).mean()), rel=1e-9)
    best = torch.cat([row.argmax(-1) for row in plain_logits(scorer, groups)[0::2]])
    right = best == torch.cat(targets(groups)[0::2])
    assert found["mean_token_accuracy"] == pytest.approx(float(right.double().mean()), abs=1e-12)


def test_tokens_beyond_the_shorter_completion_weigh_less(scorer: Scorer) -> None:
    """LD-DPO: by hand for every pair, in the policy's sums; the reference's are made alike."""
    groups, rows = groups_of(4), plain_logprobs(scorer, groups_of(4))
    sums = []
    for chosen, rejected in zip(rows[0::2], rows[1::2], strict=True):
        shared = min(len(chosen), len(rejected))
        sums += [row[:shared].sum() + 0.25 * row[shared:].sum() for row in (chosen, rejected)]
    assert any(len(chosen) != len(rejected) for chosen, rejected in zip(rows[0::2], rows[1::2], strict=True))
    margins = [chosen - rejected for chosen, rejected in (log_ratio(sums, index) for index in range(4))]
    expected = -torch.stack(margins).mul(0.3).sigmoid().log().sum()
    loss = weighted(["sigmoid"], [1.0], {"beta": 0.3})
    agree(scorer, PreferenceLoss(loss, PairSettings(0.3, ld_alpha=0.25)), groups, expected)
    scores = [{"logprobs": [[-1.0, -2.0, -4.0], [-3.0, -1.0]], "sums": [-7.0, -4.0]}]
    assert pair_references(scores, 0.25) == [Reference(-4.0, -4.0)]
    assert pair_references(scores, None) == [Reference(-7.0, -4.0)]
    assert sum_of_tokens([-1.0, -2.0, -4.0], 1, 0.5) == -4.0


def test_pairs_weigh_as_the_policy_would_write_them(scorer: Scorer) -> None:
    """WPO: exp of the mean of log p - log sum p^2 over each completion, without a gradient."""
    groups, rows = groups_of(3), plain_logprobs(scorer, groups_of(3))
    expected = torch.zeros((), dtype=torch.float64)
    logs = [row.log_softmax(-1).detach() for row in plain_logits(scorer, groups)]
    for index in range(3):
        chosen, rejected = log_ratio([row.sum() for row in rows], index)
        weight = torch.ones((), dtype=torch.float64)
        for place in (2 * index, 2 * index + 1):
            squares = logs[place].exp().square().sum(-1).log()
            weight = weight * (rows[place].detach() - squares).mean().exp()
        expected = expected + weight * (1 - 0.3 * (chosen - rejected)).relu()
    loss = weighted(["hinge"], [1.0], {"beta": 0.3})
    agree(scorer, PreferenceLoss(loss, PairSettings(0.3, use_weighting=True)), groups, expected)


def test_triple_preferences(scorer: Scorer) -> None:
    groups, rows = groups_of(3, branches=3), plain_logprobs(scorer, groups_of(3, branches=3))
    expected = torch.zeros((), dtype=torch.float64)
    for chosen, rejected, gold in zip(rows[0::3], rows[1::3], rows[2::3], strict=True):
        expected = expected - (0.3 * (chosen.sum() - rejected.sum())).sigmoid().log() - 0.5 * gold.mean()
    loss = weighted(["tpo"], [1.0], {"beta": 0.3, "tpo_alpha": 0.5})
    settings = PairSettings(0.3, metrics=PREFERENCE_LOSSES["tpo"].metrics)
    found = agree(scorer, PreferenceLoss(loss, settings), groups, expected)
    assert found["nll_loss"] == pytest.approx(-float(torch.stack([row.mean() for row in rows[2::3]]).mean()), rel=1e-9)


def context_for(folder: Path, **settings: Any) -> Context:
    folder.mkdir(exist_ok=True)
    for name in ("model", "dataset"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "content").write_text(name)
    defaults = {"learning_rate": 1e-2, "train_batch_size": 8, "max_steps": 3, "loss_type": "aot"}
    inputs = {name: folder / name for name in ("model", "dataset")}
    return local_context("preference", Config(**(defaults | settings)), folder=folder, inputs=inputs)


def train_coupled(folder: Path, name: str, micro_batch_tokens: int) -> tuple[Scorer, list[dict[str, float]]]:
    context = context_for(folder, micro_batch_tokens=micro_batch_tokens)
    scorer = packing_scorer(tiny_model())
    settings = PairSettings(0.5)
    loss = weighted([name, "sft"], [1.0, 0.5], {"beta": 0.5})
    trainer = Trainer(context, context.config, prepare_process(context), scorer, PreferenceLoss(loss, settings))
    windows = CoupledWindows(DatasetWindows(groups_of(8), context.config), trainer, settings, loss)
    return scorer, trainer.run(windows).metrics


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_pairs_of_a_step_are_compared_whatever_the_micro_batch(tmp_path: Path, name: str) -> None:
    """Against the loss over all pairs of the step at once, and the same however the step is cut."""
    scorer = packing_scorer(tiny_model())
    groups = groups_of(8)
    rows = plain_logprobs(scorer, groups)
    sums, tokens = torch.stack([row.sum() for row in rows]), torch.tensor([float(len(row)) for row in rows])
    references = torch.tensor([[group.data.chosen, group.data.rejected] for group in groups])
    pairs = PairLogprobs(sums[0::2], sums[1::2], *references.t(), tokens[0::2], tokens[1::2])
    loss = PREFERENCE_LOSSES[name].function(pairs, beta=0.5).mean() + 0.5 * pairs.chosen_nll().mean()
    gradients = torch.autograd.grad(loss, list(scorer.parameters()))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()

    whole, whole_metrics = train_coupled(tmp_path / "whole", name, 8192)
    cut, cut_metrics = train_coupled(tmp_path / "cut", name, 24)
    assert whole_metrics[0]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert whole_metrics[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    for one, other in zip(whole_metrics, cut_metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        assert_close(one, other, atol=1e-4, rtol=1e-4)


SYNC = Following(mixup_alpha=0.6, sync_steps=2)


class Stop(Exception):
    """Stands for a kill between two steps."""


class StoppingWindows(DatasetWindows):
    stop_before = -1

    def window(self, step: int) -> Any:
        if step == self.stop_before:
            raise Stop
        return super().window(step)


def train_following(
    folder: Path, following: Following, stop_before: int = -1
) -> tuple[Scorer, FollowingReference, list[dict[str, float]]]:
    context = context_for(folder, loss_type="sigmoid", checkpoint_steps=1, max_steps=5, learning_rate=1e-3)
    scorer, reference = packing_scorer(tiny_model()), packing_scorer(tiny_model()).requires_grad_(False)
    settings = PairSettings(0.5)
    loss = weighted(["sigmoid"], [1.0], {"beta": 0.5})
    trainer = Trainer(context, context.config, prepare_process(context), scorer, PreferenceLoss(loss, settings))
    inner = StoppingWindows(groups_of(8), context.config)
    inner.stop_before = stop_before
    windows = FollowingReference(inner, trainer, settings, reference, following)
    return scorer, windows, trainer.run(windows).metrics


def test_a_reference_that_follows(tmp_path: Path) -> None:
    """After a whole move policy and reference are one, so the loss is log 2; otherwise it is not."""
    _, _, metrics = train_following(tmp_path, Following(mixup_alpha=1.0, sync_steps=2))
    at_log2 = [row["loss"] == pytest.approx(0.693147, abs=1e-5) for row in metrics]
    assert at_log2 == [True, False, True, False, True]


def test_a_reference_goes_part_of_the_way(tmp_path: Path) -> None:
    _, windows, _ = train_following(tmp_path, SYNC)
    before = [parameter.clone() for parameter in windows.scorer.parameters()]
    windows.data(step=3, groups=groups_of(2))
    assert all(torch.equal(one, other) for one, other in zip(windows.scorer.parameters(), before, strict=True))
    windows.data(step=4, groups=groups_of(2))
    policy = windows.trainer.policy().parameters()
    for moved, old, target in zip(windows.scorer.parameters(), before, policy, strict=True):
        assert_close(moved, 0.4 * old + 0.6 * target, atol=1e-6, rtol=1e-6)


def test_a_moving_reference_looks_at_one_pair_at_a_time(tmp_path: Path) -> None:
    """Numbers without a gradient, the same for a pair alone and among others."""
    _, windows, _ = train_following(tmp_path, SYNC)
    groups = groups_of(4)
    whole = windows.data(step=1, groups=groups)
    alone = [windows.data(step=1, groups=[group])[0] for group in groups]
    for one, other in zip(whole, alone, strict=True):
        assert (one.chosen, one.rejected) == pytest.approx((other.chosen, other.rejected), rel=1e-5)
    assert not any(parameter.requires_grad for parameter in windows.scorer.parameters())


@pytest.mark.parametrize("stop_before", [2, 3])
def test_a_reference_that_follows_resumes_with_the_same_bits(tmp_path: Path, stop_before: int) -> None:
    """Stopped right before a move, and between two of them."""
    whole, whole_windows, expected = train_following(tmp_path / "whole", SYNC)
    with pytest.raises(Stop):
        train_following(tmp_path / "stopped", SYNC, stop_before)
    resumed, resumed_windows, metrics = train_following(tmp_path / "stopped", SYNC)
    assert resumed_windows.trainer.context.resumed_from == stop_before
    assert metrics == expected
    for one, other in ((whole, resumed), (whole_windows.scorer, resumed_windows.scorer)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
