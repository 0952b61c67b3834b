"""A whole step of on-line DPO and of A*-PO, against TRL's own trainers on the same models and completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.losses.online import optimal_value
from stages.losses.preference import ipo, weighted
from stages.training.a2po import AdvantageRegression, Regressed
from stages.training.batch import Branch, Group
from stages.training.model import Scorer
from stages.training.online_loss import JudgedPair, OnlinePairLoss
from stages.training.preference import PairSettings
from tests.data.characters import build_tokenizer
from tests.oracles.steps import Step, gradient_norm, trainer_of
from tests.training.conftest import packing_scorer, random_groups, tiny_model
from tests.training.test_objectives import plain_logprobs

trl = pytest.importorskip("trl", reason="the oracle is an extra: pip install -e '.[benchmarks]'")
PROMPTS, TOKENS, BETA = 4, 5, 0.3


def models() -> tuple[Any, Any]:
    """(policy, reference)."""
    policy, reference = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.linspace(-0.02, 0.02, parameter.numel()).reshape(parameter.shape))
    return policy, reference


def groups_of(completions: int) -> list[Group]:
    """Prompts of one length and completions of one length: TRL counts padding in `objective/...`."""
    made = random_groups(PROMPTS, completions, seed=4, prefix=(6, 7))
    draws = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 60, (PROMPTS, completions, TOKENS), generator=draws).tolist()
    return [
        replace(group, branches=tuple(Branch(ids) for ids in rows)) for group, rows in zip(made, tokens, strict=True)
    ]


def stacked(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """(prompts, completions) as TRL lays them out: the first completions of all prompts, then the second ones."""
    count = len(groups[0].branches)
    prompts = torch.tensor([list(group.prefix_ids) for group in groups]).repeat(count, 1)
    completions = [list(group.branches[place].token_ids) for place in range(count) for group in groups]
    return prompts, torch.tensor(completions)


def sums(model: Any, groups: list[Group]) -> list[list[float]]:
    """Of every group the log-probabilities of its completions."""
    with torch.no_grad():
        values = [float(row.sum()) for row in plain_logprobs(Scorer(model), groups)]
    count = len(groups[0].branches)
    return [values[start : start + count] for start in range(0, len(values), count)]


def our_step(objective: Any, policy: Any, groups: list[Group]) -> Step:
    scorer = packing_scorer(policy)
    total, metrics = objective(scorer, scorer.layout(groups))
    means = {name: float(one.sum) / float(one.count) for name, one in metrics.items()}
    return Step(float(total.detach()) / len(groups), gradient_norm(policy, total / len(groups)), means)


def same(ours: Step, theirs: Step, names: set[str]) -> None:
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5, abs=1e-6)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
    assert names <= set(theirs.metrics)
    assert {name: ours.metrics[name] for name in names} == pytest.approx(
        {name: theirs.metrics[name] for name in names}, rel=1e-5, abs=1e-5
    )


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": weighted(["sigmoid"], [1.0], {"beta": BETA}),
    # TRL's is of sums on line and of means off line, ours of means: (d - 1 / 2b)^2 = T^2 (d / T - 1 / 2bT)^2
    "ipo": lambda pairs: TOKENS**2 * ipo(pairs, beta=BETA * TOKENS),
}


@pytest.mark.parametrize("name", LOSSES)
def test_online_dpo(tmp_path: Path, name: str) -> None:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    policy, reference = models()
    groups = groups_of(2)
    rewards = [[1.0, 0.5], [0.0, 2.0], [0.25, -1.0], [3.0, 4.0]]

    def scored(completions: list[str], **_: Any) -> list[float]:
        return [pair[place] for place in range(2) for pair in rewards]

    fields = {"beta": BETA, "loss_type": name, "max_length": 64, "max_new_tokens": TOKENS}
    data = [{"prompt": "a"}] * PROMPTS
    trainer = trainer_of(
        tmp_path, OnlineDPOTrainer, OnlineDPOConfig, policy, fields, data, ref_model=reference, reward_funcs=scored
    )
    prompts, completions = stacked(groups)
    ones = torch.ones_like
    trainer._generate = lambda *_: (prompts, ones(prompts), completions, ones(completions), None)
    norms: list[float] = []
    trainer.accelerator.backward = lambda loss: norms.append(gradient_norm(policy, loss))
    loss = float(trainer.training_step(policy, {"prompt": ["a"] * PROMPTS}))
    theirs = Step(loss, norms[0], {key: float(values[-1]) for key, values in trainer.stats.items() if values})

    known = []
    for group, pair, (first, second) in zip(groups, rewards, sums(reference, groups), strict=True):
        order = (0, 1) if pair[0] >= pair[1] else (1, 0)
        data_of = JudgedPair(*((first, second)[place] for place in order), rewards=(pair[order[0]], pair[order[1]]))
        known.append(replace(group, branches=tuple(group.branches[place] for place in order), data=data_of))
    ours = our_step(OnlinePairLoss(LOSSES[name], PairSettings(BETA)), policy.eval(), known)
    kinds = ("objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward")
    rest = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
    same(ours, theirs, {*kinds, *rest, "logps/rejected"})


def test_a2po(tmp_path: Path) -> None:
    policy, reference = models()
    groups = groups_of(1)
    samples, rewards = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0] * 3, [1.0] * 3], [1.0, 0.0, 1.0, 0.0]
    given = iter([one for row in samples for one in row])
    trainer = a2po_trainer(tmp_path, policy, lambda completions, **_: [next(given) for _ in completions])
    trainer._estimate_optimal_values()
    values = [optimal_value(row, beta1=0.4) for row in samples]
    assert trainer._optimal_values == pytest.approx(dict(zip("abcd", values, strict=True)), abs=1e-6)
    assert [row["prompt"] for row in trainer.train_dataset] == ["a", "b", "d"]  # of c no sample earned anything

    prompts, completions = stacked(groups)
    references = [total for (total,) in sums(reference, groups)]
    ids = torch.cat([prompts, completions], 1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "logits_to_keep": TOKENS,
        "ref_logps": torch.tensor(references),
        "rewards": torch.tensor(rewards),
        "v_star": torch.tensor(values),
    }
    policy.train()
    loss = trainer.compute_loss(policy, inputs)
    metrics = {name: float(values[-1]) for name, values in trainer._metrics["train"].items()}
    theirs = Step(float(loss.detach()), gradient_norm(policy, loss), metrics)
    known = [
        replace(group, data=Regressed(reward - value, total))
        for group, reward, value, total in zip(groups, rewards, values, references, strict=True)
    ]
    ours = our_step(AdvantageRegression(0.2), policy.eval(), known)
    same(ours, theirs, {"implicit_reward", "advantage"})


def a2po_trainer(folder: Path, model: Any, reward: Callable[..., list[float]]) -> Any:
    from datasets import Dataset
    from trl.experimental.a2po import A2POConfig, A2POTrainer

    args = A2POConfig(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        bf16=False,
        beta1=0.4,
        beta2=0.2,
        num_value_samples=3,
        max_completion_length=2,
        per_device_train_batch_size=PROMPTS,
    )
    return A2POTrainer(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": letter} for letter in "abcd"]),
        processing_class=build_tokenizer(),
    )
