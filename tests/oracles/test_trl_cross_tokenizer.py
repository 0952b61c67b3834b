"""Distillation between two tokenizers against the loss of TRL's GOLD trainer on the same logits; and where TRL's is not
what it says."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.data.common_ends import Part, common_groups
from stages.data.readings import Reader
from stages.data.token_bytes import Span
from stages.losses.group_loss import MERGES, GroupLoss, GroupTokens, Matching, group_losses, hybrid_parts, merged
from tests.data.two_tokenizers import byte_level
from tests.losses.test_group_loss import by_rank

trl = pytest.importorskip("trl", reason="the oracle is an extra: pip install -e '.[benchmarks]'")

V, U, PROMPTS = 11, 8, (3, 5)
ENDS = [1, 3, 4, 7, 8], [2, 3, 7, 8]
"""The bytes at which the tokens of student and teacher end: groups of (2, 2), (2, 1) and (1, 1) tokens."""
SIZES = [2, 2, 1], [2, 1, 1]


def theirs_of(matching: Matching | None = None, **settings: Any) -> Any:
    """TRL's loss with these settings, over the matching that ours has."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    given = {
        "crossentropy_weight": 0.0,
        "distillation_weight": 1.0,
        "student_temperature": 1.0,
        "teacher_temperature": 1.0,
        "skip_student_eos": False,
        "skip_teacher_eos": False,
        "token_merge_strategy": "bayesian",
        "use_hybrid_loss": matching is not None,
        "hybrid_matched_weight": None,
        "hybrid_unmatched_weight": None,
    }
    named = {f"uld_{name}": value for name, value in {**given, **settings}.items() if name != "beta"}
    loss = ULDLoss(SimpleNamespace(**named, use_extended_uld=True, beta=settings.get("beta", 0.5)))
    if matching is not None:
        own, other = matching.student_M.tolist(), matching.teacher_M.tolist()
        loss._vocab_mapping = dict(zip(other, own, strict=True))
        loss._teacher_matched_ids, loss._student_matched_ids = set(other), set(own)
        loss.mapping_tensor = torch.full((max(other) + 1,), -1, dtype=torch.long)
        loss.mapping_tensor[matching.teacher_M] = matching.student_M
    return loss


def sides() -> list[tuple[Tensor, Tensor]]:
    """(logits [T, V], token ids [T]) of a prompt and the completion, for student and teacher."""
    draws = torch.Generator().manual_seed(2)
    lengths = [prompt + len(ends) for prompt, ends in zip(PROMPTS, ENDS, strict=True)]
    return [
        (
            torch.randn(length, size, generator=draws, dtype=torch.float64).requires_grad_(),
            torch.randint(0, size, (length,), generator=draws),
        )
        for length, size in zip(lengths, (V, U), strict=True)
    ]


def called(loss: Any, both: list[tuple[Tensor, Tensor]]) -> Tensor:
    """TRL's loss of the row."""
    logits, ids, labels, offsets = [], [], [], []
    for (logits_TV, ids_T), prompt, ends in zip(both, PROMPTS, ENDS, strict=True):
        logits.append(logits_TV[None])
        ids.append(ids_T[None])
        labels.append(torch.where(torch.arange(len(ids_T)) < prompt, -100, ids_T)[None])
        starts = [0, *ends[:-1]]
        offsets.append(torch.tensor([[(0, 0)] * prompt + list(zip(starts, ends, strict=True))]))
    return loss(*logits, *labels, *ids, *offsets)


def ours_of(loss: GroupLoss, both: list[tuple[Tensor, Tensor]], temperatures: tuple[float, float]) -> Tensor:
    """The same by ours: [G, 2]."""
    made = [
        (logits_TV[prompt - 1 : -1] / temperature, GroupTokens(ids_T[prompt:], sizes))
        for (logits_TV, ids_T), prompt, sizes, temperature in zip(both, PROMPTS, SIZES, temperatures, strict=True)
    ]
    return group_losses(made[0], made[1], loss, temperature=temperatures[0])[0]


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.7, 1.6)])
@pytest.mark.parametrize("beta", [None, 0.5, 0.2])
@pytest.mark.parametrize("weights", [None, (0.3, 0.9)])
def test_whole_rows(beta: float | None, weights: tuple[float, float] | None, temperatures: tuple[float, float]) -> None:
    """Distances by rank (`beta` None), and hybrids, of a row with its groups, merged by the chain rule."""
    both = sides()
    settings: dict[str, Any] = {"student_temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    matching = Matching.of(torch.tensor([0, 9, 4]), torch.tensor([3, 0, 7]), (V, U))
    if beta is None:
        loss, theirs = GroupLoss(MERGES["bayesian"], by_rank, (1.0,)), theirs_of(**settings)
    else:
        chosen = weights or (3 / U, 1 - 3 / U)
        loss = GroupLoss(MERGES["bayesian"], partial(hybrid_parts, matching=matching, beta=beta), chosen)
        given = dict(zip(("hybrid_matched_weight", "hybrid_unmatched_weight"), weights or (None, None), strict=True))
        theirs = theirs_of(matching, beta=beta, **given, **settings)
    expected, found = called(theirs, both), ours_of(loss, both, temperatures)[:, 0].mean()
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad(one, both[0][0])[0] for one in (found, expected)]
    assert_close(*slopes, rtol=1e-4, atol=1e-6)


def test_cross_entropy_is_a_mean_over_tokens_there() -> None:
    """Ours is over groups, as the divergence is: 3 of these 5 tokens."""
    both = sides()
    expected = called(theirs_of(crossentropy_weight=1.0, distillation_weight=0.0, student_temperature=0.7), both)
    found = ours_of(GroupLoss(MERGES["bayesian"], by_rank, (1.0,), 1.0), both, (0.7, 1.0))[:, 1]
    assert_close(found.sum() / 5, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MERGES)
def test_merging(name: str) -> None:
    (logits, ids), _ = sides()
    groups = [[0, 1], [2, 3], [4], [5, 6, 7]]
    expected = theirs_of(token_merge_strategy=name)._merge_probabilities_with_alignment_groups(
        logits.softmax(-1), groups, ids.tolist()
    )
    found, _ = merged(logits, GroupTokens(ids, [len(group) for group in groups]), MERGES[name])
    assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_their_observed_merge_of_a_whole_row_is_one_token_late() -> None:
    """It takes the distribution of the token that follows: the logits that predict the first token of the completion
    have no part in its loss, and those behind the last one do."""
    both = sides()
    (slope,) = torch.autograd.grad(called(theirs_of(token_merge_strategy="observed"), both), both[0][0])
    assert not slope[PROMPTS[0] - 1].any() and slope[-1].any()
    ours = ours_of(GroupLoss(MERGES["observed"], by_rank, (1.0,)), both, (1.0, 1.0))[:, 0].mean()
    (slope,) = torch.autograd.grad(ours, both[0][0])
    assert slope[PROMPTS[0] - 1].any() and not slope[-1].any()


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_their_kl_of_parts_of_a_distribution_misses_the_difference_of_their_sums(beta: float) -> None:
    """It is below zero for a student that gives the matched tokens less (1), or more (0), than the teacher does."""
    matching = Matching.of(torch.arange(4), torch.arange(4), (V, U))
    student, teacher = (torch.full((1, size), 0.4 / (size - 4), dtype=torch.float64) for size in (V, U))
    student[:, :4], teacher[:, :4] = (0.05, 0.15) if beta == 1 else (0.2, 0.15)
    theirs = theirs_of(matching, beta=beta)._compute_jsd_loss_for_matched_tokens(student[:, :4], teacher[:, :4])
    ours = hybrid_parts(student, teacher, matching, beta)[:, 0]
    difference = float((teacher[:, :4] - student[:, :4]).sum()) * (1 if beta == 1 else -1)
    assert_close(ours, theirs[None] + difference, rtol=1e-5, atol=1e-8)
    assert theirs < 0 < ours


def test_alignment() -> None:
    """Of the bytes of real texts by two tokenizers; TRL's last group has what is left over, ours leaves it."""
    from trl.experimental.gold.gold_trainer import ULDLoss
    from trl.experimental.utils import encode_with_byte_offsets

    text = "naïve  €5 — 12,000 ok\n"
    tokenizers = byte_level(["Ã ¯", "Ġ Ġ", "â Ĥ", "0 0"]), byte_level(["1 2", "v e", "Ġ â", "Ĥ ¬", "o k"])
    parts, offsets = [], []
    for tokenizer in tokenizers:
        ((token_ids, found),) = encode_with_byte_offsets(tokenizer.backend_tokenizer, [text])
        reading = Reader(tokenizer).given({"row_id": "r", "prompt": "", "completion": text})
        assert reading.token_ids == [*token_ids, tokenizer.eos_token_id]
        assert [tuple(span) for span in reading.part.spans[:-1]] == found
        parts.append(Part(reading.part.spans[:-1], Span(0, len(text.encode()))))
        offsets.append(found)
    groups = common_groups(*parts)
    own, other = ULDLoss._align_by_byte_offsets(*offsets)
    assert [(list(group.own), list(group.other)) for group in groups] == list(zip(own, other, strict=True))
    assert {(len(one), len(two)) for one, two in zip(own, other, strict=True)} >= {(1, 1), (2, 1), (1, 2)}
