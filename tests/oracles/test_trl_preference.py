"""A whole step of every preference loss of TRL's DPO trainer, against that trainer on the same models and rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.losses.f_divergence import f_divergence_of
from stages.training.batch import Group
from stages.training.following import Following
from tests.oracles.pair_steps import BETA, examples, our_step, rows, with_references
from tests.oracles.steps import Step, agree, gradient_norm, logged, trainer_of
from tests.training.conftest import packing_scorer, tiny_model
from tests.training.test_preference import train_following

trl = pytest.importorskip("trl", reason="the oracle is an extra: pip install -e '.[benchmarks]'")


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, torch.nn.Module, torch.nn.Module]:
    """(trainer, policy, reference)."""
    policy, reference = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.linspace(-0.02, 0.02, parameter.numel()).reshape(parameter.shape))

    class Trainer(trl.DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    folder = tmp_path_factory.mktemp("dpo")
    fields, data = {"beta": BETA, "use_weighting": True}, examples(rows(2))
    trainer = trainer_of(folder, Trainer, trl.DPOConfig, policy, fields, data, ref_model=reference)
    return trainer, policy, reference


SMOOTHED = {"label_smoothing": 0.1}
STEPS: list[tuple[list[str], dict[str, Any]]] = [
    *(([name], {}) for name in ("sigmoid", "hinge", "ipo", "sigmoid_norm", "discopop", "robust")),
    *(([name], {}) for name in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired")),
    *(([name], SMOOTHED) for name in ("robust", "exo_pair", "aot", "aot_unpaired")),
    *((["sigmoid"], {"f_divergence_type": kind}) for kind in ("forward_kl", "js_divergence", "alpha_divergence")),
    *(([name], {"f_divergence_type": "js_divergence"}) for name in ("ipo", "sigmoid_norm", "hinge", "discopop")),
    (["exo_pair"], {"f_divergence_type": "forward_kl", **SMOOTHED}),
    (["sigmoid"], {"ld_alpha": 0.4}),
    (["apo_zero"], {"ld_alpha": 0.0}),
    (["ipo"], {"ld_alpha": 0.5}),
    (["aot"], {"ld_alpha": 0.5}),
    (["sigmoid"], {"use_weighting": True}),
    (["sppo_hard"], {"use_weighting": True, "ld_alpha": 0.5}),
    (["sigmoid", "bco_pair"], {"loss_weights": [0.8, 0.2]}),
    # not hinge: weighing it in place breaks TRL's backward pass
    (["ipo", "sigmoid", "nca_pair"], {"loss_weights": [0.5, 2.0, 1.0], "use_weighting": True}),
]


DEFAULTS: dict[str, Any] = {
    "label_smoothing": 0.0,
    "ld_alpha": None,
    "use_weighting": False,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
}


def dpo_step(
    trainer: Any, policy: torch.nn.Module, groups: Sequence[Group], names: list[str], settings: Mapping[str, Any]
) -> Step:
    """TRL's, with the trainer's settings changed."""
    trainer.loss_types = names
    for name, value in settings.items():
        setattr(trainer, name, value)
    trainer._metrics["train"].clear()
    policy.train()
    loss = trainer._compute_loss(policy, trainer.data_collator(examples(groups)), False)
    return Step(float(loss.detach()), gradient_norm(policy, loss), logged(trainer))


@pytest.mark.parametrize(("names", "given"), STEPS, ids=lambda value: "-".join(map(str, value)))
def test_dpo(dpo: tuple[Any, torch.nn.Module, torch.nn.Module], names: list[str], given: dict[str, Any]) -> None:
    trainer, policy, reference = dpo
    changed = {**DEFAULTS, "loss_weights": [1.0] * len(names), **given}
    groups = rows(2)
    theirs = dpo_step(trainer, policy, groups, names, changed)
    ours = our_step(
        policy,
        reference,
        groups,
        names,
        weights=changed["loss_weights"],
        settings={"label_smoothing": changed["label_smoothing"], "discopop_tau": 0.05},
        divergence=f_divergence_of(changed["f_divergence_type"], 0.5),
        ld_alpha=changed["ld_alpha"],
        use_weighting=changed["use_weighting"],
    )
    agree(ours, theirs)


def test_sigmoid_with_label_smoothing_is_cdpo_here_alone(dpo: tuple[Any, torch.nn.Module, torch.nn.Module]) -> None:
    """TRL takes the setting and leaves it out of this loss; ours is 0.9 of the loss and 0.1 of the flipped pair's."""
    trainer, policy, reference = dpo
    groups = rows(2)
    theirs = dpo_step(trainer, policy, groups, ["sigmoid"], {**DEFAULTS, "loss_weights": [1.0], **SMOOTHED})
    plain = our_step(policy, reference, groups, ["sigmoid"])
    assert theirs.loss == pytest.approx(plain.loss, rel=1e-5)
    # L(-x) = L(x) + x, so a tenth of the mean margin more
    smoothed = our_step(policy, reference, groups, ["sigmoid"], settings=SMOOTHED)
    assert smoothed.loss == pytest.approx(plain.loss + 0.1 * plain.metrics["rewards/margins"], rel=1e-5)


def test_shared_tokens_count_once(dpo: tuple[Any, torch.nn.Module, torch.nn.Module]) -> None:
    """`num_tokens` is what was computed: TRL's, less the tokens that both rows of a pair begin with."""
    trainer, policy, _ = dpo
    groups, before = rows(2), trainer._total_train_tokens
    dpo_step(trainer, policy, groups, ["sigmoid"], {**DEFAULTS, "loss_weights": [1.0]})
    shared = sum(len(group.prefix_ids) for group in groups)
    assert all(group.branches[0].token_ids[0] != group.branches[1].token_ids[0] for group in groups)
    assert packing_scorer(policy).layout(groups).num_tokens == trainer._total_train_tokens - before - shared


def test_reference_that_follows(dpo: tuple[Any, torch.nn.Module, torch.nn.Module], tmp_path: Path) -> None:
    """TR-DPO: after the same steps of ours, TRL's callback moves its reference to the same weights."""
    from trl.trainer.callbacks import SyncRefModelCallback

    found, windows, _ = train_following(tmp_path, Following(mixup_alpha=0.6, sync_steps=2))
    policy, theirs = found.model, deepcopy(windows.scorer.model)
    callback = SyncRefModelCallback(ref_model=theirs, accelerator=None)
    arguments = SimpleNamespace(ref_model_sync_steps=2, ref_model_mixup_alpha=0.6)
    for steps in (5, 6):  # nothing happens after an odd number of steps
        callback.on_step_end(arguments, SimpleNamespace(global_step=steps), None, model=policy)
        windows.data(step=steps, groups=with_references(theirs, rows(2), None))
        for one, other in zip(windows.scorer.model.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6)


def test_likelihood_term_differs_by_lengths(dpo: tuple[Any, torch.nn.Module, torch.nn.Module]) -> None:
    """RPO's term is normalized by each pair's length; TRL's by the tokens of the batch. Equal for equal lengths."""
    trainer, policy, reference = dpo
    for equal in (True, False):
        groups = rows(2, equal=equal)
        theirs = dpo_step(trainer, policy, groups, ["sft"], {**DEFAULTS, "loss_weights": [1.0]})
        ours = our_step(policy, reference, groups, ["sft"])
        if equal:
            agree(ours, theirs)
        else:
            assert ours.loss != pytest.approx(theirs.loss, rel=1e-3)
