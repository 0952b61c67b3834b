"""A whole step of the unpaired losses that TRL has, against TRL's own trainer on the same model and rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.losses.unpaired import UNPAIRED_LOSSES
from stages.training.batch import Branch, Group
from stages.training.model import Scorer
from stages.training.unpaired import Judged, UnpairedLoss
from tests.oracles.steps import Step, agree, gradient_norm, logged, trainer_of
from tests.training.conftest import packing_scorer, random_groups, tiny_model
from tests.training.test_objectives import plain_logprobs

trl = pytest.importorskip("trl", reason="the oracle is an extra: pip install -e '.[benchmarks]'")
BETA, WEIGHTS = 0.3, {"desirable_weight": 1.5, "undesirable_weight": 0.5}


def rows(reference: torch.nn.Module) -> list[Group]:
    """Eight judged completions, each with the next one's as its mismatched one."""
    made = random_groups(8, 1)
    groups = []
    for index, group in enumerate(made):
        other = made[(index + 1) % 8].branches[0].token_ids
        both = replace(group, branches=(group.branches[0], Branch(other)))
        with torch.no_grad():
            own, mismatched = (float(row.sum()) for row in plain_logprobs(Scorer(reference), [both]))
        groups.append(replace(group, data=Judged(index % 3 != 1, own, tuple(other), mismatched)))
    return groups


def example(group: Group) -> dict[str, Any]:
    ids = {"prompt_ids": group.prefix_ids, "completion_ids": group.branches[0].token_ids}
    return {name: list(values) for name, values in ids.items()} | {
        "KL_completion_ids": list(group.data.mismatched),
        "label": group.data.desirable,
    }


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_kto(tmp_path: Path, name: str) -> None:
    policy, reference = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.linspace(-0.02, 0.02, parameter.numel()).reshape(parameter.shape))

    class Trainer(trl.KTOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    groups = rows(reference)
    data = [example(group) for group in groups]
    fields = {"beta": BETA, "loss_type": name, **WEIGHTS}
    trainer = trainer_of(tmp_path, Trainer, trl.KTOConfig, policy, fields, data, ref_model=reference)
    policy.train()
    loss = trainer._compute_loss(policy, trainer.data_collator(data), False)
    theirs = Step(float(loss.detach()), gradient_norm(policy, loss), logged(trainer))

    with torch.no_grad():
        others = [replace(group, branches=(Branch(group.data.mismatched),)) for group in groups]
        sums = [float(row.sum()) for row in plain_logprobs(Scorer(policy), others)]
    ratios = [value - group.data.mismatched_reference for value, group in zip(sums, groups, strict=True)]
    kl = max(0.0, sum(ratios) / len(ratios)) if name == "kto" else 0.0
    known = [replace(group, data=replace(group.data, kl=kl)) for group in groups]
    scorer = packing_scorer(policy)
    # TRL logs a KL term of 0 where the loss has none
    objective = UnpairedLoss(UNPAIRED_LOSSES[name].with_settings({"beta": BETA, **WEIGHTS}), BETA, ["kl"])
    total, metrics = objective(scorer, scorer.layout(known))
    means = {key: float(one.sum) / float(one.count) for key, one in metrics.items()}
    means |= objective.concluded(means)
    ours = Step(float(total.detach()) / len(known), gradient_norm(policy, total / len(known)), means)
    agree(ours, theirs)
    assert "rewards/margins" in means
