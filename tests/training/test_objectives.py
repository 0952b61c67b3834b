"""Every objective on a tiny model against its loss written out on the model's own logits of separate rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from artifacts.errors import StageError
from stages.losses.distillation import divergence_of
from stages.losses.policy import POLICY_LOSSES
from stages.losses.policy_kl import k3
from stages.losses.policy_tokens import LOG_RATIOS, PolicyTokens, Sequences
from stages.losses.preference import sigmoid
from stages.training import worst_difference
from stages.training.batch import Group, TokenBatch
from stages.training.distillation import DistillationLoss
from stages.training.language_modeling import TokenLoss
from stages.training.metrics import Mean
from stages.training.model import Scorer
from stages.training.objective import Bounding
from stages.training.pairs import Reference
from stages.training.policy import PolicyLoss
from stages.training.policy_known import Rollouts
from stages.training.policy_terms import PolicySettings
from stages.training.preference import PairSettings, PreferenceLoss
from stages.training.teachers import LocalTeacher
from stages.training.worst_difference import LARGEST, WorstDifference
from tests.losses.heads import Work
from tests.training.conftest import VOCABULARY, random_groups, tiny_model

SETTINGS = PolicySettings(
    loss=POLICY_LOSSES["grpo"],
    temperature=0.8,
    max_completion_length=8,
    tolerance=None,
    parameters={"epsilon": 0.1, "epsilon_high": 0.2},
)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(tiny_model().double())


def plain_logits(scorer: Scorer, groups: list[Group]) -> list[Tensor]:
    """Of the tokens of every branch [T, V], each sequence alone."""
    rows = []
    for group in groups:
        for branch in group.branches:
            ids = torch.tensor([[*group.prefix_ids, *branch.token_ids]])
            rows.append(scorer.model(input_ids=ids).logits[0, len(group.prefix_ids) - 1 : -1])
    return rows


def targets(groups: list[Group]) -> list[Tensor]:
    return [torch.tensor(branch.token_ids) for group in groups for branch in group.branches]


def plain_logprobs(scorer: Scorer, groups: list[Group], temperature: float = 1.0) -> list[Tensor]:
    logits = [(row / temperature).log_softmax(-1) for row in plain_logits(scorer, groups)]
    return [row.gather(1, ids[:, None])[:, 0] for row, ids in zip(logits, targets(groups), strict=True)]


def gradients(scorer: Scorer, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [one for one in scorer.parameters() if one.requires_grad]))


def agree(scorer: Scorer, objective: Any, groups: list[Group], expected: Tensor) -> dict[str, float]:
    """Loss and gradients are those of `expected`; gives back the metrics."""
    wanted = gradients(scorer, expected)
    loss, metrics = objective(scorer, scorer.layout(groups))
    assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    for gradient, other in zip(gradients(scorer, loss), wanted, strict=True):
        assert_close(gradient, other, rtol=1e-7, atol=1e-9)
    extremes = objective.extremes if isinstance(objective, Bounding) else {}
    assert set(metrics) <= {*objective.metric_names, *extremes}
    return {name: float(mean.sum) / float(mean.count) for name, mean in metrics.items()}


def test_supervised(scorer: Scorer) -> None:
    groups = random_groups(4, 2)
    logs = torch.cat([row.log_softmax(-1) for row in plain_logits(scorer, groups)])
    ids = torch.cat(targets(groups))
    metrics = agree(scorer, TokenLoss(), groups, -logs.gather(1, ids[:, None]).sum())
    assert metrics["entropy"] == pytest.approx(float(-(logs.exp() * logs).sum(-1).mean()), rel=1e-9)
    assert metrics["mean_token_accuracy"] == float((logs.argmax(-1) == ids).double().mean())


def test_preference(scorer: Scorer) -> None:
    groups = [replace(group, data=Reference(-9.0 - i, -8.0)) for i, group in enumerate(random_groups(4, 2))]
    sums = [row.sum() for row in plain_logprobs(scorer, groups)]
    margins = [sums[2 * i] - sums[2 * i + 1] - (-9.0 - i + 8.0) for i in range(4)]
    expected = -torch.stack(margins).mul(0.3).sigmoid().log().sum()
    metrics = agree(scorer, PreferenceLoss(partial(sigmoid, beta=0.3), PairSettings(0.3)), groups, expected)
    assert metrics["rewards/margins"] == pytest.approx(float(torch.stack(margins).mean()) * 0.3, rel=1e-9)
    assert metrics["logps/chosen"] == pytest.approx(float(torch.stack(sums[0::2]).mean()), rel=1e-9)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.4])
def test_distillation(scorer: Scorer, beta: float) -> None:
    torch.manual_seed(1)
    teacher = Scorer(tiny_model("qwen3").double().requires_grad_(False))
    groups = random_groups(3, 2)
    student_logits, teacher_logits = (torch.cat(plain_logits(one, groups)) / 0.7 for one in (scorer, teacher))
    values = divergence_of(beta).of_logits(student_logits, teacher_logits)
    metrics = agree(
        scorer, DistillationLoss(LocalTeacher(teacher, None, 0.7), divergence_of(beta), 0.7), groups, values.sum()
    )
    assert metrics["divergence"] == pytest.approx(float(values.mean()), rel=1e-9)


@pytest.mark.parametrize("filled", ["student", "teacher"])
def test_distillation_of_vocabularies_filled_up_to_other_sizes(filled: str) -> None:
    """Qwen2.5's models of one tokenizer, say: over the tokens that both have, with gradients for these alone."""
    sizes = {filled: VOCABULARY + 9}
    student, teacher = (
        Scorer(tiny_model(kind, vocab_size=sizes.get(name, VOCABULARY), tie_word_embeddings=False).double())
        for name, kind in (("student", "llama"), ("teacher", "qwen3"))
    )
    groups = random_groups(3, 2)
    student_logits, teacher_logits = (
        torch.cat(plain_logits(one, groups))[:, :VOCABULARY] / 0.7 for one in (student, teacher)
    )
    values = divergence_of(0.4).of_logits(student_logits, teacher_logits.detach())
    local = LocalTeacher(teacher, None, 0.7)
    metrics = agree(student, DistillationLoss(local, divergence_of(0.4), 0.7), groups, values.sum())
    assert metrics["divergence"] == pytest.approx(float(values.mean()), rel=1e-9)


def test_distillation_from_a_teacher_with_another_prompt(scorer: Scorer) -> None:
    """Here teacher and student are one module, whose gradient comes from the student's pass alone."""
    groups = [replace(group, data=(5, 3, *group.prefix_ids, 4)[i:]) for i, group in enumerate(random_groups(4, 1))]
    seen = [replace(group, prefix_ids=group.data) for group in groups]
    student_logits, teacher_logits = (torch.cat(plain_logits(scorer, one)) / 0.7 for one in (groups, seen))
    values = divergence_of(0.4).of_logits(student_logits, teacher_logits.detach())
    objective = DistillationLoss(LocalTeacher(scorer, None, 0.7), divergence_of(0.4), 0.7)
    metrics = agree(scorer, objective, groups, values.sum())
    assert metrics["divergence"] == pytest.approx(float(values.mean()), rel=1e-9) and values.mean() > 0
    # a step in pieces is the step
    parts = [objective(scorer, scorer.layout(part))[0] for part in (groups[:1], groups[1:3], groups[3:])]
    assert_close(torch.stack(parts).sum(), values.sum(), rtol=1e-9, atol=1e-9)


def rollouts(scorer: Scorer, *, on_policy: bool) -> list[Group]:
    """Groups of three completions with advantages; off policy, later ones were less likely before."""
    groups = random_groups(3, 3)
    with torch.no_grad():
        rows = [row.tolist() for row in plain_logprobs(scorer, groups, SETTINGS.temperature)]
    made = []
    for number, group in enumerate(groups):
        own = rows[3 * number : 3 * number + 3]
        old = tuple(
            [value + 0.3 * (-1) ** t - 0.4 * place for t, value in enumerate(row)] for place, row in enumerate(own)
        )
        reference = tuple([value - 0.2 * (t % 3) for t, value in enumerate(row)] for row in own)
        data = Rollouts((1.0, -0.5, 0.25 + number), tuple(own), None if on_policy else old, reference)
        made.append(replace(group, data=data))
    return made


def plain_policy_loss(scorer: Scorer, groups: list[Group], settings: PolicySettings) -> Tensor:
    """The weighted sum over all tokens, with everything laid out as whole tensors."""
    rows = plain_logprobs(scorer, groups, settings.temperature)
    logprobs = torch.cat(rows)
    branch = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row) for row in rows]))
    known: list[Rollouts] = [group.data for group in groups]

    def tokens(field: Callable[[Rollouts], Any]) -> Tensor:
        return torch.tensor([value for one in known for row in field(one) for value in row], dtype=torch.float64)

    old = logprobs.detach() if known[0].old_logprobs is None else tokens(lambda one: one.old_logprobs)
    advantages = torch.tensor([value for one in known for value in one.advantages], dtype=torch.float64)[branch]
    sequences = Sequences(branch, len(rows))
    ratios = LOG_RATIOS[settings.importance_sampling_level or settings.loss.level](logprobs - old, sequences)
    seen = PolicyTokens(ratios, logprobs - old, logprobs, advantages, sequences)
    losses = settings.loss.with_settings(settings.parameters)(seen)
    kl = k3(logprobs, tokens(lambda one: one.reference_logprobs))
    losses = losses + settings.beta * (kl * ratios.exp() if settings.use_bias_correction_kl else kl)
    lengths = torch.tensor([len(row) for row in rows])
    return (losses * settings.loss.aggregation.weights(lengths, branch, 8, torch.float64)).sum()


@pytest.mark.parametrize("level", LOG_RATIOS)
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize(
    ("beta", "loss", "corrected"), [(0.0, "grpo", False), (0.1, "dapo", False), (0.1, "luspo", True)]
)
def test_policy(scorer: Scorer, level: str, on_policy: bool, beta: float, loss: str, corrected: bool) -> None:
    settings = replace(
        SETTINGS,
        loss=POLICY_LOSSES[loss],
        importance_sampling_level=level,
        beta=beta,
        use_bias_correction_kl=corrected,
        tolerance=1e-6,
    )
    groups = rollouts(scorer, on_policy=on_policy)
    metrics = agree(scorer, PolicyLoss(settings), groups, plain_policy_loss(scorer, groups, settings))
    assert ("kl" in metrics) == bool(beta)
    assert (metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"] > 0) != on_policy
    assert ("sampling/sampling_logp_difference/mean" in metrics) == on_policy


def head_products(scorer: Scorer, objective: Any, batch: TokenBatch) -> float:
    """Products of the head in forward and backward pass: those with the vocabulary on one side."""
    with Work(only=VOCABULARY) as work:
        loss, _ = objective(scorer, batch)
        gradients(scorer, loss)
    return work.products(len(batch.target_N), VOCABULARY, 32)


def test_three_products_of_the_head(scorer: Scorer) -> None:
    """Also of a sequence-level ratio on policy, whose slope is known beforehand."""
    groups = rollouts(scorer, on_policy=True)
    for level in LOG_RATIOS:
        settings = replace(SETTINGS, importance_sampling_level=level)
        assert head_products(scorer, PolicyLoss(settings), scorer.layout(groups)) == 3
    assert head_products(scorer, TokenLoss(), scorer.layout(random_groups(3, 3))) == 3


def test_a_sampler_that_disagrees_is_an_error(scorer: Scorer) -> None:
    groups = rollouts(scorer, on_policy=True)
    wrong = groups[1].data
    sampled = (wrong.sampled_logprobs[0], [value - 0.5 for value in wrong.sampled_logprobs[1]])
    groups[1] = replace(groups[1], data=replace(wrong, sampled_logprobs=(*sampled, wrong.sampled_logprobs[2])))
    for tolerance in (0.1, 0.6):
        objective = PolicyLoss(replace(SETTINGS, tolerance=tolerance))
        _, metrics = objective(scorer, scorer.layout(groups))
        assert float(metrics[LARGEST].sum) == pytest.approx(0.5, abs=1e-6)
        step = {LARGEST: float(metrics[LARGEST].sum)}
        if tolerance == 0.1:
            with pytest.raises(StageError, match=r"of row row1 log-probability .* weights, or computes differently"):
                objective.concluded(step)
        objective.concluded(step)  # of the step after, where it goes on


def test_every_process_raises_what_one_has_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that has no group at all, by the worst token of all."""
    theirs = [("row7", [0.5, 1.0, 3.0, -1.5, -1.0]), ("row2", [0.7, 0.0, 4.0, -1.7, -1.0])]
    monkeypatch.setattr(worst_difference, "gathered", lambda own: [own, *theirs])
    found = WorstDifference(0.1, "trainer")
    found.require({LARGEST: 0.05})
    with pytest.raises(StageError, match=r"token 4 of a completion of row row2 log-probability -1\.7000, the trainer"):
        found.require({LARGEST: 0.7})
    WorstDifference(0.8, "trainer").require({LARGEST: 0.9})  # of a batch that is not compared


def test_metrics_wait_for_no_device(scorer: Scorer) -> None:
    """Sums stay tensors; counts are known on the host."""
    groups = rollouts(scorer, on_policy=False)
    supervised = TokenLoss(), random_groups(3, 3)
    for objective, given in (supervised, (PolicyLoss(replace(SETTINGS, beta=0.1)), groups)):
        _, metrics = objective(scorer, scorer.layout(given))
        assert metrics
        for mean in metrics.values():
            assert isinstance(mean, Mean) and isinstance(mean.sum, Tensor) and isinstance(mean.count, int)
            assert not mean.sum.requires_grad
