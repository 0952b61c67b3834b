"""A whole step of the preference losses without a reference, against TRL's trainers on the same model and rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.losses.preference import PREFERENCE_LOSSES
from stages.training.batch import Branch, Group
from stages.training.model import Scorer
from tests.oracles.pair_steps import BETA, PAIRS, examples, our_step, rows
from tests.oracles.steps import Step, agree, gradient_norm, logged, trainer_of
from tests.training.conftest import tiny_model
from tests.training.test_objectives import plain_logprobs

trl = pytest.importorskip("trl", reason="the oracle is an extra: pip install -e '.[benchmarks]'")


def labelled(groups: Sequence[Group], *, pad: int) -> dict[str, torch.Tensor]:
    """Batches of TRL's CPO and ORPO trainers."""
    batch: dict[str, torch.Tensor] = {}
    for place, side in enumerate(("chosen", "rejected")):
        whole = [[*group.prefix_ids, *group.branches[place].token_ids] for group in groups]
        width = max(map(len, whole))
        asked = [[-100] * len(group.prefix_ids) + list(group.branches[place].token_ids) for group in groups]
        batch[f"{side}_input_ids"] = torch.tensor([row + [pad] * (width - len(row)) for row in whole])
        batch[f"{side}_labels"] = torch.tensor([row + [-100] * (width - len(row)) for row in asked])
        batch[f"{side}_attention_mask"] = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole])
    return batch


TEXTS = [{"prompt": "ab", "chosen": "cd", "rejected": "ef"}] * PAIRS


@pytest.mark.parametrize(
    ("name", "theirs", "settings"),
    [
        ("cpo", {"loss_type": "sigmoid"}, {"cpo_alpha": 0.7, "label_smoothing": 0.0}),
        ("cpo", {"loss_type": "sigmoid"}, {"cpo_alpha": 0.0, "label_smoothing": 0.2}),
        ("cpo_hinge", {"loss_type": "hinge"}, {"cpo_alpha": 0.7}),
        ("cpo_ipo", {"loss_type": "ipo"}, {"cpo_alpha": 0.7}),
        ("simpo", {"loss_type": "simpo", "cpo_alpha": 0.0}, {"simpo_gamma": 0.6}),
        ("simpo", {"loss_type": "simpo", "cpo_alpha": 0.0}, {"simpo_gamma": 0.6, "label_smoothing": 0.2}),
        ("alphapo", {"loss_type": "simpo", "cpo_alpha": 0.0}, {"simpo_gamma": 0.6, "alpha": 0.25}),
        (
            "alphapo",
            {"loss_type": "simpo", "cpo_alpha": 0.0},
            {"simpo_gamma": 0.1, "alpha": -0.5, "label_smoothing": 0.2},
        ),
    ],
)
def test_cpo(tmp_path: Path, name: str, theirs: dict[str, Any], settings: dict[str, float]) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model, groups = tiny_model(), rows(2, equal=True)
    fields = {"beta": BETA, **theirs, **settings}
    trainer = trainer_of(tmp_path, CPOTrainer, CPOConfig, model, fields, TEXTS)
    loss, metrics = trainer.get_batch_loss_metrics(model, labelled(groups, pad=trainer.pad_token_id))
    step = Step(float(loss.detach()), gradient_norm(model, loss), metrics)
    ours = our_step(model, None, groups, [name], settings=settings)
    per_token = PREFERENCE_LOSSES[name].reward is not None
    unlike = logps_per_token(ours) if per_token else {}
    if settings.get("cpo_alpha") == 0:  # TRL does not compute it then
        unlike |= {"nll_loss": 0.0}
    if per_token and name != "cpo_ipo":  # no such metric of ours, and no such term
        step.metrics.pop("nll_loss")
    agree(ours, step, unlike)


def logps_per_token(ours: Step) -> dict[str, float]:
    """TRL's logps where the loss takes means: of a token. All chosen completions have 4, all rejected ones 7."""
    return {"logps/chosen": ours.metrics["logps/chosen"] / 4, "logps/rejected": ours.metrics["logps/rejected"] / 7}


def test_orpo(tmp_path: Path) -> None:
    """TRL's likelihood term counts the prompt too: of all tokens but each row's first. The rest agrees."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model, groups = tiny_model(), rows(2)
    trainer = trainer_of(tmp_path, ORPOTrainer, ORPOConfig, model, {"beta": BETA}, TEXTS)
    batch = labelled(groups, pad=trainer.padding_value)
    loss, metrics = trainer.get_batch_loss_metrics(model, batch)
    ours = our_step(model, None, groups, ["orpo"])
    whole = [Group(one.row_id, one.prefix_ids[:1], (after_first(one),)) for one in groups]
    with torch.no_grad():
        likelihood = -float(torch.cat(plain_logprobs(Scorer(model), whole)).mean())
    ratio = float(loss.detach()) - likelihood
    assert ours.loss - ours.metrics["nll_loss"] == pytest.approx(ratio, rel=1e-5)
    # the gradient of what differs, taken off TRL's
    rest = loss - torch.cat([-row for row in plain_logprobs(Scorer(model), whole)]).mean()
    own = torch.stack([-row.mean() for row in plain_logprobs(Scorer(model), [chosen_of(one) for one in groups])])
    theirs = Step(ratio + float(own.mean().detach()), gradient_norm(model, rest + own.mean()), metrics)
    rewards = {side: ours.metrics[f"rewards/{side}"] / BETA for side in ("chosen", "rejected")}  # of a token
    unlike = {"nll_loss": likelihood} | {f"logps/{side}": value for side, value in rewards.items()}
    agree(ours, theirs, unlike)


def after_first(group: Group) -> Branch:
    """The chosen row without its first token."""
    return Branch([*group.prefix_ids[1:], *group.branches[0].token_ids])


def chosen_of(group: Group) -> Group:
    return replace(group, branches=group.branches[:1])


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("tpo", {"loss_type": "sigmoid", "label_smoothing": 0.1}),
        ("tpo_hinge", {"loss_type": "hinge"}),
        ("tpo_ipo", {"loss_type": "ipo"}),
        ("tpo_l", {"loss_type": "tpo-l", "tpo_l_gamma": 0.4}),
        ("tpo_l", {"loss_type": "tpo-l", "tpo_l_gamma": 0.4, "label_smoothing": 0.1}),
    ],
)
def test_tpo(tmp_path: Path, name: str, theirs: dict[str, Any]) -> None:
    from trl.experimental.tpo import TPOConfig, TPOTrainer

    class Trainer(TPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    model, groups = tiny_model(), rows(3, equal=True)
    fields = {"beta": BETA, "tpo_alpha": 0.5, **theirs}
    trainer = trainer_of(tmp_path, Trainer, TPOConfig, model, fields, examples(groups))
    model.train()
    loss = trainer._compute_loss(model, trainer.data_collator(examples(groups)), False)
    step = Step(float(loss.detach()), gradient_norm(model, loss), logged(trainer))
    settings = {key: value for key, value in fields.items() if key in PREFERENCE_LOSSES[name].parameters}
    ours = our_step(model, None, groups, [name], settings=settings)
    agree(ours, step, {} if PREFERENCE_LOSSES[name].reward is None else logps_per_token(ours))
