"""IW-OPD against the loss of TRL's trainer on the logits of the same models."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses.sampled_distillation import SAMPLED_LOSSES
from stages.training.batch import Group
from stages.training.model import Scorer
from stages.training.sampled_distillation import SampledBranch, SampledDistillationLoss, SampledSettings, telling
from stages.training.teachers import LocalTeacher
from tests.training.conftest import random_groups, tiny_model
from tests.training.test_objectives import plain_logits, plain_logprobs

trl = pytest.importorskip("trl", reason="the oracle is an extra: pip install -e '.[benchmarks]'")


def padded(rows: list[Tensor], value: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def their_loss(logits: tuple[list[Tensor], list[Tensor]], groups: list[Group], **settings: Any) -> tuple[Tensor, Any]:
    """(TRL's loss of a padded batch, its metrics), from logits [T, V] of student and teacher for every completion."""
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

    sampled = settings.pop("sampled")
    metrics: Any = {"train": defaultdict(list)}
    trainer = SimpleNamespace(model=SimpleNamespace(training=True), iw_opd_epsilon=1e-8, _metrics=metrics, **settings)
    branches = [branch for group in groups for branch in group.branches]
    ids = [torch.tensor(branch.token_ids) for branch in branches]
    ours, theirs = (padded(one, 0.0) for one in logits)
    tokens = padded(ids, 0)
    told = (theirs / trainer.temperature).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    loss = IWOPDTrainer._compute_iw_opd_loss(
        trainer,
        ours,
        tokens,
        padded(ids, -100),
        told.detach(),
        padded([torch.tensor(branch.logprobs) for branch in branches], 0.0) if sampled else None,
        num_items_in_batch=sum(map(len, ids)),
    )
    return loss, {name: values[0] for name, values in metrics["train"].items()}


@pytest.mark.parametrize(("gamma", "temperature"), [(0.5, 1.0), (2.0, 0.7), (0.0, 1.3)])
@pytest.mark.parametrize("off_by", [0.0, 0.2])
def test_iw_opd(gamma: float, temperature: float, off_by: float) -> None:
    """On policy, where TRL takes the student's log-probabilities for the sampler's, and with a sampler's own."""
    student, teacher = Scorer(tiny_model()), Scorer(tiny_model("qwen3").requires_grad_(False))
    drawn, groups = random_groups(3, 2), []
    with torch.no_grad():
        rows = iter([(row + off_by).tolist() for row in plain_logprobs(student, drawn, temperature)])
    for group in drawn:
        made = tuple(SampledBranch(branch.token_ids, None, next(rows)) for branch in group.branches)
        groups.append(replace(group, branches=made))
    logits = plain_logits(student, groups), plain_logits(teacher, groups)
    expected, theirs = their_loss(
        logits, groups, sampled=bool(off_by), temperature=temperature, iw_opd_gamma=gamma, beta=1.0
    )
    settings = SampledSettings(SAMPLED_LOSSES["iw_opd"], {"iw_opd_gamma": gamma}, temperature)
    objective = SampledDistillationLoss(telling(LocalTeacher(teacher, None, temperature), whole=False), settings)
    total, metrics = objective(student, student.layout(groups))
    found = total / sum(map(objective.count, groups))
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    parameters = list(student.parameters())
    slopes = [torch.autograd.grad(one, parameters) for one in (found, expected)]
    for ours, other in zip(*slopes, strict=True):
        assert_close(ours, other, rtol=1e-4, atol=1e-5)
    assert len(theirs) == 5
    for name, value in theirs.items():
        assert float(metrics[name].sum) / float(metrics[name].count) == pytest.approx(value, rel=1e-5), name
