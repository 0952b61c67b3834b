"""A whole step of every preference loss that TRL has, against TRL's own trainers on the same model and rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.losses.f_divergence import f_divergence_of
from stages.losses.preference import PREFERENCE_LOSSES, weighted
from stages.seeds import generator
from stages.training.batch import Branch, Group
from stages.training.model import Scorer
from stages.training.pairs import NO_REFERENCE
from stages.training.preference import PairSettings, PreferenceLoss
from stages.training.reference import pair_references
from tests.oracles.steps import Step, agree, gradient_norm, trainer_of
from tests.training.conftest import VOCABULARY, packing_scorer, tiny_model
from tests.training.test_objectives import plain_logprobs

trl = pytest.importorskip("trl", reason="the oracle is an extra: pip install -e '.[benchmarks]'")
BETA, PAIRS = 0.3, 6
REPORTED = ("chosen", "rejected", "accuracies", "margins")
METRICS = (*(f"rewards/{name}" for name in REPORTED), "logps/chosen", "logps/rejected")


def rows(completions: int, *, equal: bool = False) -> list[Group]:
    """Prompts with that many completions; with `equal`, all completions of a rank have one length."""
    draws = generator(5, "oracle", completions)

    def ids(length: int) -> list[int]:
        drawn: list[int] = draws.integers(3, VOCABULARY, length).tolist()
        return drawn

    groups = []
    for number in range(PAIRS):
        prompt = ids(int(draws.integers(2, 9)))
        lengths = [4, 7, 5] if equal else draws.integers(2, 10, completions).tolist()
        tails = tuple(Branch(ids(length)) for length in lengths[:completions])
        groups.append(Group(f"row{number}", prompt, tails))
    return groups


def examples(groups: Sequence[Group]) -> list[dict[str, Any]]:
    names = ("chosen_ids", "rejected_ids", "reference_ids")
    return [
        {"prompt_ids": list(group.prefix_ids)}
        | {name: list(branch.token_ids) for name, branch in zip(names, group.branches, strict=False)}
        for group in groups
    ]


def our_step(
    model: torch.nn.Module,
    reference: torch.nn.Module | None,
    groups: Sequence[Group],
    names: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    settings: Mapping[str, float] | None = None,
    **variant: Any,
) -> Step:
    """The step on packed rows with shared prompts."""
    losses = [PREFERENCE_LOSSES[name] for name in names]
    pair = PairSettings(BETA, reward_per_token=losses[0].per_token, metrics=losses[0].metrics, **variant)
    if reference is not None:
        groups = with_references(reference, groups, pair.ld_alpha)
    else:
        groups = [replace(group, data=NO_REFERENCE) for group in groups]
    scorer = packing_scorer(model)
    loss = weighted(names, weights or [1.0] * len(names), {"beta": BETA, **(settings or {})})
    total, metrics = PreferenceLoss(loss, pair)(scorer, scorer.layout(list(groups)))
    norm = gradient_norm(model, total / len(groups))
    return Step(
        float(total) / len(groups), norm, {name: float(one.sum) / float(one.count) for name, one in metrics.items()}
    )


def with_references(reference: torch.nn.Module, groups: Sequence[Group], ld_alpha: float | None) -> list[Group]:
    with torch.no_grad():
        tokens = [row.tolist() for row in plain_logprobs(Scorer(reference), list(groups))]
    pairs = zip(tokens[0::2], tokens[1::2], strict=True)
    scored = [{"sums": [sum(one) for one in pair], "logprobs": list(pair)} for pair in pairs]
    return [replace(group, data=one) for group, one in zip(groups, pair_references(scored, ld_alpha), strict=True)]


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
    (["ipo"], {"f_divergence_type": "js_divergence"}),
    (["sigmoid"], {"ld_alpha": 0.4}),
    (["apo_zero"], {"ld_alpha": 0.0}),
    (["sigmoid"], {"use_weighting": True}),
    (["sigmoid", "bco_pair"], {"loss_weights": [0.8, 0.2]}),
]


@pytest.mark.parametrize(("names", "given"), STEPS, ids=lambda value: "-".join(map(str, value)))
def test_dpo(dpo: tuple[Any, torch.nn.Module, torch.nn.Module], names: list[str], given: dict[str, Any]) -> None:
    trainer, policy, reference = dpo
    defaults = {"label_smoothing": 0.0, "ld_alpha": None, "use_weighting": False, "f_divergence_type": "reverse_kl"}
    changed = {**defaults, "loss_weights": [1.0] * len(names), "f_alpha_divergence_coef": 0.5, **given}
    trainer.loss_types = names
    for name, value in changed.items():
        setattr(trainer, name, value)
    trainer._metrics["train"].clear()
    policy.train()
    groups = rows(2)
    loss = trainer._compute_loss(policy, trainer.data_collator(examples(groups)), False)
    found = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    theirs = Step(float(loss), gradient_norm(policy, loss), found)
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
    agree(ours, theirs, (*METRICS, "entropy", "mean_token_accuracy"))


def test_likelihood_term_differs_by_lengths(dpo: tuple[Any, torch.nn.Module, torch.nn.Module]) -> None:
    """RPO's term is normalized by each pair's length; TRL's by the tokens of the batch. Equal for equal lengths."""
    trainer, policy, reference = dpo
    for name, value in {"loss_types": ["sft"], "loss_weights": [1.0], "ld_alpha": None, "use_weighting": False}.items():
        setattr(trainer, name, value)
    for equal in (True, False):
        groups = rows(2, equal=equal)
        loss = trainer._compute_loss(policy, trainer.data_collator(examples(groups)), False)
        ours = our_step(policy, reference, groups, ["sft"])
        assert (abs(ours.loss - float(loss)) < 1e-5) == equal
        if equal:
            assert ours.grad_norm == pytest.approx(gradient_norm(policy, loss), rel=1e-5)


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
        ("simpo", {"loss_type": "simpo", "cpo_alpha": 0.0}, {"simpo_gamma": 0.6}),
        ("alphapo", {"loss_type": "simpo", "cpo_alpha": 0.0}, {"simpo_gamma": 0.6, "alpha": 0.25}),
    ],
)
def test_cpo(tmp_path: Path, name: str, theirs: dict[str, Any], settings: dict[str, float]) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model, groups = tiny_model(), rows(2, equal=True)
    fields = {"beta": BETA, **theirs, **settings}
    trainer = trainer_of(tmp_path, CPOTrainer, CPOConfig, model, fields, TEXTS)
    loss, metrics = trainer.get_batch_loss_metrics(model, labelled(groups, pad=trainer.pad_token_id))
    step = Step(float(loss), gradient_norm(model, loss), metrics)
    ours = our_step(model, None, groups, [name], settings=settings)
    if name == "alphapo":  # TRL reports the transformed reward; its order is the same
        agree(ours, step, ["rewards/accuracies"])
    elif name == "simpo":  # TRL's logps are means where the loss takes means
        agree(ours, step, METRICS[:4])
    else:
        agree(ours, step, [*METRICS, *(["nll_loss"] if settings["cpo_alpha"] else [])])


def test_orpo(tmp_path: Path) -> None:
    """TRL's likelihood term counts the prompt too; without it the rest agrees."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model, groups = tiny_model(), rows(2)
    trainer = trainer_of(tmp_path, ORPOTrainer, ORPOConfig, model, {"beta": BETA}, TEXTS)
    batch = labelled(groups, pad=trainer.padding_value)
    loss, metrics = trainer.get_batch_loss_metrics(model, batch)
    ours = our_step(model, None, groups, ["orpo"])
    rest = float(loss) - float(metrics["nll_loss"])
    assert ours.loss - ours.metrics["nll_loss"] == pytest.approx(rest, rel=1e-5)
    assert ours.metrics["nll_loss"] != pytest.approx(float(metrics["nll_loss"]), rel=1e-3)
    for name in (*METRICS[:4], "log_odds_ratio", "log_odds_chosen"):
        assert ours.metrics[name] == pytest.approx(float(metrics[name]), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("tpo", {"loss_type": "sigmoid", "label_smoothing": 0.1}), ("tpo_l", {"loss_type": "tpo-l", "tpo_l_gamma": 0.4})],
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
    found = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    step = Step(float(loss), gradient_norm(model, loss), found)
    settings = {key: value for key, value in fields.items() if key in PREFERENCE_LOSSES[name].parameters}
    ours = our_step(model, None, groups, [name], settings=settings)
    logps = METRICS if name == "tpo" else METRICS[:4]  # TRL's logps are means where the loss takes means
    agree(ours, step, [*logps, "mean_token_accuracy", "entropy"])
