"""Distillation by policy gradients on a tiny model, against the loss written out row by row on the models' logits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from artifacts.errors import StageError
from stages.losses.policy_correction import MODES, Correction
from stages.losses.sampled_distillation import SAMPLED_LOSSES
from stages.training.batch import Group, TokenBatch
from stages.training.metrics import Extreme
from stages.training.model import Scorer
from stages.training.sampled_distillation import (
    SampledBranch,
    SampledDistillationLoss,
    SampledSettings,
    Told,
    telling,
)
from stages.training.teachers import LocalTeacher
from stages.training.worst_difference import LARGEST
from tests.training.conftest import VOCABULARY, packing_scorer, random_groups, tiny_model
from tests.training.test_objectives import agree, gradients, plain_logits, plain_logprobs

TEMPERATURE = 0.7
PARTS: dict[str, dict[str, Any]] = {
    "iw_opd": {"iw_opd_gamma": 0.8},
    "minillm": {"gamma": 0.9},
    "minillm, the sampled token alone": {"single_step_decomposition": False, "length_normalization": False},
}


@pytest.fixture(scope="module")
def student() -> Scorer:
    return Scorer(tiny_model().double())


@pytest.fixture(scope="module")
def teacher() -> Scorer:
    return Scorer(tiny_model("qwen3").double().requires_grad_(False))


def settings_of(parts: str, **more: Any) -> SampledSettings:
    loss, parameters = SAMPLED_LOSSES[parts.split(",")[0]], PARTS[parts]
    decomposes = loss.name == "minillm" and parameters.get("single_step_decomposition", True)
    return SampledSettings(loss, parameters, TEMPERATURE, decomposes=decomposes, **more)


def objective_of(teacher: Scorer, settings: SampledSettings) -> SampledDistillationLoss:
    tell = telling(LocalTeacher(teacher, None, TEMPERATURE), whole=settings.decomposes)
    return SampledDistillationLoss(tell, settings)


def sampled(student: Scorer, *, off_by: float = 0.0, masked: bool = False) -> list[Group]:
    """Groups of two completions with what their sampler said, which may be off the student's by up to so much; the
    second token of each may be masked, and what is said of it is nonsense."""
    groups, made = random_groups(4, 2), []
    with torch.no_grad():
        rows = iter([row.tolist() for row in plain_logprobs(student, groups, TEMPERATURE)])
    for group in groups:
        branches = []
        for branch in group.branches:
            logprobs = [value + off_by * (-1) ** t / (t + 1) for t, value in enumerate(next(rows))]
            mask = None
            if masked and len(logprobs) > 1:
                mask, logprobs[1] = [t != 1 for t in range(len(logprobs))], 1e9
            branches.append(SampledBranch(branch.token_ids, mask, logprobs))
        made.append(replace(group, branches=tuple(branches)))
    return made


def credit_of(parts: str, advantages_T: list[float]) -> list[float]:
    """By the formulas' sums, token by token."""
    count, found = len(advantages_T), []
    given = {"gamma": 1.0, "length_normalization": True, "single_step_decomposition": True, **PARTS[parts]}
    for t in range(count):
        if parts == "iw_opd":
            before = sum(abs(value) for value in advantages_T[:t])
            whole = sum(abs(value) for value in advantages_T)
            found.append((1 + 0.8 * (1 - before / whole)) * advantages_T[t])
            continue
        powers = {s: given["gamma"] ** (s - t) for s in range(t + given["single_step_decomposition"], count)}
        total = sum(power * advantages_T[s] for s, power in powers.items())
        found.append(total / (sum(powers.values()) or 1.0) if given["length_normalization"] else total)
    return found


def plain_loss(
    student: Scorer, teacher: Scorer, groups: list[Group], parts: str, correction: Correction | None = None
) -> tuple[Tensor, Tensor]:
    """(loss, a_t of all tokens), each completion alone."""
    branches = [branch for group in groups for branch in group.branches]
    loss, advantages = torch.zeros((), dtype=torch.float64), []
    for ours_TV, theirs_TV, branch in zip(
        *(plain_logits(one, groups) for one in (student, teacher)), branches, strict=True
    ):
        asked = [t for t in range(len(branch.token_ids)) if branch.loss_mask is None or branch.loss_mask[t]]
        ours_TV, theirs_TV = ((one[asked] / TEMPERATURE).log_softmax(-1) for one in (ours_TV, theirs_TV))
        at = torch.tensor(branch.token_ids)[asked][:, None]
        ours_T, said_T = ours_TV.gather(1, at)[:, 0], torch.tensor(branch.logprobs, dtype=torch.float64)[asked]
        advantages_T = theirs_TV.gather(1, at)[:, 0].detach() - said_T
        credits_T = torch.tensor(credit_of(parts, advantages_T.tolist()), dtype=torch.float64)
        arrival = 1.0
        if correction is not None:
            ratios_T = ours_T.detach() - said_T
            ratios_T = ratios_T if correction.mode.of_single_tokens else ratios_T.sum().expand(len(asked))
            ratios_T = ratios_T.exp().clamp(max=correction.clip_max)
            credits_T = credits_T * ratios_T
            arrival = 1.0 if correction.mode.of_single_tokens else float(ratios_T[0])
        loss = loss - (credits_T * ours_T).sum()
        if parts == "minillm":
            loss = loss + arrival * (ours_TV.exp() * (ours_TV - theirs_TV.detach())).sum()
        advantages.append(advantages_T)
    return loss, torch.cat(advantages)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradients(student: Scorer, teacher: Scorer, parts: str, masked: bool) -> None:
    groups = sampled(student, off_by=0.3, masked=masked)
    expected, advantages_N = plain_loss(student, teacher, groups, parts)
    metrics = agree(student, objective_of(teacher, settings_of(parts)), groups, expected)
    if parts != "minillm":
        assert metrics["divergence"] == pytest.approx(-float(advantages_N.mean()), rel=1e-9)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(0.3)


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_truncate"])
@pytest.mark.parametrize("parts", ["iw_opd", "minillm"])
def test_corrections_to_the_sampler(student: Scorer, teacher: Scorer, parts: str, mode: str) -> None:
    correction = Correction(MODES[mode], None, 1.2)
    groups = sampled(student, off_by=0.4)
    expected, _ = plain_loss(student, teacher, groups, parts, correction)
    metrics = agree(student, objective_of(teacher, settings_of(parts, correction=correction)), groups, expected)
    assert 0.6 < metrics["sampling/importance_sampling_ratio/mean"] < 1.2


@pytest.mark.parametrize("mode", ["sequence_mask", "geometric_mask"])
@pytest.mark.parametrize("parts", ["iw_opd", "minillm"])
def test_nothing_is_learnt_of_masked_completions(student: Scorer, teacher: Scorer, parts: str, mode: str) -> None:
    """What the sampler found e^3 times less likely at every token, the student would not have come to so."""
    apart = [
        replace(
            group,
            branches=tuple(replace(one, logprobs=[value - 3 for value in one.logprobs]) for one in group.branches),
        )
        for group in sampled(student)
    ]
    objective = objective_of(teacher, settings_of(parts, correction=Correction(MODES[mode], None, 1.2)))
    loss, metrics = objective(student, student.layout(apart))
    assert loss.item() == 0 and not any(one.any() for one in gradients(student, loss))
    assert float(metrics["divergence"].sum) != 0


def test_the_ratio_of_a_sequence_is_one_value_in_its_metric(student: Scorer, teacher: Scorer) -> None:
    """However many tokens it has; TRL's metric is the same."""
    groups = sampled(student, off_by=0.4)
    settings = settings_of("iw_opd", correction=Correction(MODES["sequence_truncate"], None, 1.2))
    _, metrics = objective_of(teacher, settings)(student, student.layout(groups))
    lengths = [len(branch.token_ids) for group in groups for branch in group.branches]
    ratios = [min(1.2, math.exp(-sum(0.4 * (-1) ** t / (t + 1) for t in range(length)))) for length in lengths]
    found = metrics["sampling/importance_sampling_ratio/mean"]
    assert len({*lengths}) > 1 and found.count == len(ratios)
    assert float(found.sum) == pytest.approx(sum(ratios), rel=1e-9)


@pytest.mark.parametrize("parts", PARTS)
def test_packed_rows_with_shared_prompts(student: Scorer, teacher: Scorer, parts: str) -> None:
    """Both completions of a prompt behind one copy of it, and all prompts in one row."""
    groups = sampled(student, off_by=0.3)
    packed, packed_teacher = packing_scorer(tiny_model().double()), packing_scorer(tiny_model("qwen3").double())
    loss, metrics = objective_of(teacher, settings_of(parts))(student, student.layout(groups))
    other, others = objective_of(packed_teacher, settings_of(parts))(packed, packed.layout(groups))
    assert packed.layout(groups).num_tokens < student.layout(groups).num_tokens
    assert_close(other, loss, rtol=1e-6, atol=1e-6)
    for one, another in zip(gradients(packed, other), gradients(student, loss), strict=True):
        assert_close(one, another, rtol=1e-4, atol=1e-5)
    for name, mean in metrics.items():
        assert float(others[name].sum) == pytest.approx(float(mean.sum), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("parts", PARTS)
def test_cutting_up_a_step_changes_nothing(student: Scorer, teacher: Scorer, parts: str) -> None:
    """In micro-batches of any sizes loss, gradients and metrics are those of the whole."""
    objective, groups = objective_of(teacher, settings_of(parts)), sampled(student, off_by=0.3)
    whole, metrics = objective(student, student.layout(groups))
    wanted = gradients(student, whole)
    cuts = [[groups[:1], groups[1:2], groups[2:3], groups[3:]], [groups[:1], groups[1:]], [groups[2:], groups[:2]]]
    for cut in cuts:
        made = [objective(student, student.layout(part)) for part in cut]
        total = torch.stack([loss for loss, _ in made]).sum()
        assert_close(total, whole, rtol=1e-10, atol=1e-10)
        for one, other in zip(gradients(student, total), wanted, strict=True):
            assert_close(one, other, rtol=1e-8, atol=1e-10)
        for name, mean in metrics.items():
            values = [found[name] for _, found in made]
            if isinstance(mean, Extreme):
                bound = max if objective.extremes[name] > 0 else min
                assert bound(float(one.sum) for one in values) == pytest.approx(float(mean.sum), rel=1e-9)
            else:
                assert sum(float(one.sum) for one in values) == pytest.approx(float(mean.sum), rel=1e-9)
                assert sum(one.count for one in values) == mean.count


def test_the_teacher_sees_another_prompt(student: Scorer) -> None:
    """Privileged context: teacher and student are one model, whose gradient comes from the student's pass alone."""
    groups = [replace(group, data=(5, 3, *group.prefix_ids)) for group in sampled(student)]
    seen = [replace(group, prefix_ids=group.data) for group in groups]
    ours, theirs = (torch.cat(plain_logprobs(student, one, TEMPERATURE)) for one in (groups, seen))
    expected = -(ours * (theirs - ours).detach()).sum()
    settings = SampledSettings(SAMPLED_LOSSES["iw_opd"], {"iw_opd_gamma": 0.0}, TEMPERATURE)
    agree(student, objective_of(student, settings), groups, expected)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(student: Scorer) -> None:
    for parts in PARTS:
        loss, metrics = objective_of(student, settings_of(parts))(student, student.layout(sampled(student)))
        assert all(float(one.abs().max()) < 1e-9 for one in gradients(student, loss))
        assert float(metrics["divergence"].sum) == pytest.approx(0.0, abs=1e-9)


def test_a_larger_vocabulary_of_the_student(teacher: Scorer) -> None:
    """Filled up behind the last token: sampled is from all, and so is what the student says of it."""
    larger = Scorer(tiny_model(vocab_size=VOCABULARY + 9, tie_word_embeddings=False).double())
    groups = sampled(larger)
    metrics = agree(
        larger,
        objective_of(teacher, settings_of("iw_opd", tolerance=1e-6)),
        groups,
        plain_loss(larger, teacher, groups, "iw_opd")[0],
    )
    assert metrics["iw_opd/max_weight"] == 1.8


@pytest.mark.parametrize("parts", PARTS)
def test_a_sampled_token_that_the_teacher_does_not_have(teacher: Scorer, parts: str) -> None:
    """Among what fills up the student's head; those after it would be read by the teacher, which has no embedding."""
    larger = Scorer(tiny_model(vocab_size=VOCABULARY + 9, tie_word_embeddings=False).double())
    for token_ids in ((3, VOCABULARY + 4, 5), (3, VOCABULARY + 4)):
        batch = larger.layout([Group("row0", (1, 2), (SampledBranch(token_ids, None, [-1.0] * len(token_ids)),))])
        with pytest.raises(StageError, match=rf"row row0 has token {VOCABULARY + 4}, the teacher knows {VOCABULARY}"):
            objective_of(teacher, settings_of(parts))(larger, batch)


def test_a_sampled_token_that_the_teacher_rules_out(student: Scorer, teacher: Scorer) -> None:
    batch = student.layout(sampled(student))
    tell = telling(LocalTeacher(teacher, None, TEMPERATURE), whole=False)
    at = len(batch.target_N) - 1

    def ruling_out(batch: TokenBatch) -> Told:
        logprobs_N = tell(batch).logprobs_N
        logprobs_N[at] = -math.inf
        return Told(logprobs_N)

    message = rf"gives token {int(batch.target_N[at])} of a completion of row row3 log-probability -inf, of which"
    objective = SampledDistillationLoss(ruling_out, settings_of("iw_opd"))
    assert math.isnan(objective(student.train(), batch)[0])
    with pytest.raises(StageError, match=message):
        objective(student.eval(), batch)


def test_a_sampler_that_disagrees_is_an_error(student: Scorer, teacher: Scorer) -> None:
    groups = sampled(student, off_by=0.3)
    for tolerance in (0.1, 0.31):
        objective = objective_of(teacher, settings_of("iw_opd", tolerance=tolerance))
        _, metrics = objective(student, student.layout(groups))
        step = {LARGEST: float(metrics[LARGEST].sum)}
        if tolerance == 0.1:
            with pytest.raises(StageError, match=r"of row row\d log-probability .* weights, or computes differently"):
                objective.concluded(step)
        objective.concluded(step)


@pytest.mark.parametrize("parts", PARTS)
def test_completions_without_a_token(student: Scorer, teacher: Scorer, parts: str) -> None:
    """Beside others they change nothing, and alone they have a gradient of zero."""
    objective, groups = objective_of(teacher, settings_of(parts)), sampled(student)
    empty = Group("empty", (5, 6), (SampledBranch((), None, ()),))
    loss, metrics = objective(student, student.layout([empty]))
    assert loss.item() == 0 and not any(one.any() for one in gradients(student, loss))
    assert set(metrics) <= {*objective.metric_names}
    whole, _ = objective(student, student.layout(groups))
    assert_close(objective(student, student.layout([empty, *groups]))[0], whole, rtol=1e-12, atol=1e-12)
