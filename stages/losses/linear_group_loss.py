"""A loss of groups of tokens, from hidden states: gradients formed on the way forward, a chunk of groups at a time.

N student's and M teacher's tokens, G groups, V and U vocabularies, C positions of a chunk, K parts of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from stages.losses.group_loss import GroupLoss, GroupTokens, group_losses
from stages.losses.head import ChunkedHead, Head, chunk_length
from stages.losses.host_numbers import on_device
from stages.losses.linear_divergence import compared

BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""Logits whose groups are sorted and compared at a time: about ten tensors are as large."""


def linear_group_loss(
    student_hidden: tuple[Tensor, Head],
    student: GroupTokens,
    teacher_hidden: tuple[Tensor, Head],
    teacher: GroupTokens,
    loss: GroupLoss,
    *,
    crossentropy: Sequence[bool] | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of `loss` over the groups; divergence and cross-entropy [G, 2], and parts [G, K], without a gradient).

    From (hidden states [N, H], head) of the student and of the teacher. `crossentropy`: of which groups the
    cross-entropy counts in the sum; None: of all. Exact gradients of the sum for the student's hidden states, weight
    and bias; none for the teacher. backward() works once. Logits are there for a chunk of groups; a group of more
    tokens than a chunk is one by itself. Raises ValueError for shapes that do not fit.
    """
    (hidden_NH, head), (teacher_MH, teacher_head) = student_hidden, teacher_hidden
    head.check(hidden_NH, student.targets_N)
    teacher_head.check(teacher_MH, teacher.targets_N)
    _check(student, teacher)
    limits = chunk_tokens or chunk_length(head), chunk_tokens or chunk_length(teacher_head)
    weights_G = hidden_NH.new_full((len(student.sizes),), loss.crossentropy_weight, dtype=head.sum_type)
    if crossentropy is not None:
        weights_G = weights_G * on_device(crossentropy, weights_G.device)
    comparison = _Comparison(
        _Groups(student, teacher, weights_G),
        loss,
        teacher_MH.detach(),
        ChunkedHead(teacher_head.detached(), 0, 1),
        head.temperature,
        torch.is_grad_enabled(),
        limits,
    )
    total, _ = compared(hidden_NH, head, comparison, longest=limits[0], parts=list(comparison.runs))
    return total, *comparison.found()


def _check(student: GroupTokens, teacher: GroupTokens) -> None:
    counts = [(len(one.sizes), sum(one.sizes), len(one.targets_N)) for one in (student, teacher)]
    if counts[0][0] != counts[1][0] or any(total != tokens for _, total, tokens in counts):
        raise ValueError(f"groups of student and teacher do not fit: (groups, their tokens, tokens) are {counts}")


@dataclass(frozen=True)
class _Run:
    """Some groups after one another, and where their tokens are."""

    groups: slice
    student: slice
    teacher: slice


@dataclass(frozen=True)
class _Groups:
    """Groups of both models, with the weight of each one's cross-entropy."""

    student: GroupTokens
    teacher: GroupTokens
    weights_G: Tensor

    def __getitem__(self, run: _Run) -> _Groups:
        return _Groups(
            GroupTokens(self.student.targets_N[run.student], self.student.sizes[run.groups]),
            GroupTokens(self.teacher.targets_N[run.teacher], self.teacher.sizes[run.groups]),
            self.weights_G[run.groups],
        )

    def runs(self, limits: tuple[int, int]) -> Iterator[_Run]:
        """All of them, as many at a time as have so many tokens of student and teacher; a longer one stands alone."""
        ends = [list(accumulate(tokens.sizes, initial=0)) for tokens in (self.student, self.teacher)]
        start = 0
        for stop in range(1, len(ends[0])):
            last = stop + 1 == len(ends[0])
            if last or any(end[stop + 1] - end[start] > limit for end, limit in zip(ends, limits, strict=True)):
                yield _Run(slice(start, stop), *(slice(end[start], end[stop]) for end in ends))
                start = stop


class _Comparison:
    """Compares chunk by chunk, as `linear_divergence.compared` asks for."""

    def __init__(
        self,
        groups: _Groups,
        loss: GroupLoss,
        teacher_MH: Tensor,
        teacher: ChunkedHead,
        temperature: float,
        learns: bool,
        limits: tuple[int, int],
    ) -> None:
        self.groups, self.loss, self.temperature, self.learns = groups, loss, temperature, learns
        self.teacher_MH, self.teacher = teacher_MH, teacher
        self._by_start = {run.student.start: run for run in groups.runs(limits)}
        self._found: list[tuple[Tensor, Tensor]] = []

    @property
    def runs(self) -> Iterator[slice]:
        """The student's positions, chunk by chunk."""
        return (run.student for run in self._by_start.values())

    def __call__(self, part: slice, student_CV: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [C], each group's at its first token, and what the slopes are to be multiplied by; these take the
        place of the logits."""
        run = self._by_start[part.start]
        teacher_CU = self.teacher.logits(self.teacher_MH[run.teacher])
        losses_C = student_CV.new_zeros(len(student_CV))
        groups = self.groups[run]
        for block in groups.runs((_rows(student_CV), _rows(teacher_CU))):
            losses_G, slopes_CV = self._block(groups[block], student_CV[block.student], teacher_CU[block.teacher])
            student_CV[block.student] = slopes_CV
            first = [0, *accumulate(groups.student.sizes[block.groups][:-1])]
            losses_C[block.student].index_copy_(0, on_device(first, losses_C.device), losses_G)
        return losses_C, torch.ones_like(losses_C)

    def _block(self, groups: _Groups, student_CV: Tensor, teacher_CU: Tensor) -> tuple[Tensor, Tensor]:
        """(loss [G], its slopes over the student's logits)."""
        leaf_CV = student_CV.clone().requires_grad_(self.learns)
        with torch.set_grad_enabled(self.learns):
            sums_G2, parts_GK = group_losses(
                (leaf_CV, groups.student), (teacher_CU, groups.teacher), self.loss, temperature=self.temperature
            )
            losses_G = sums_G2[:, 0] + sums_G2[:, 1] * groups.weights_G
            slopes_CV = torch.autograd.grad(losses_G.sum(), leaf_CV)[0] if self.learns else student_CV
        self._found.append((sums_G2.detach(), parts_GK.detach()))
        return losses_G.detach(), slopes_CV

    def found(self) -> tuple[Tensor, Tensor]:
        """[G, 2] and [G, K], of all groups."""
        nothing = self.groups.weights_G
        sums, parts = [nothing.new_empty(0, 2)], [nothing.new_empty(0, len(self.loss.weights))]
        for sums_G2, parts_GK in self._found:
            sums.append(sums_G2)
            parts.append(parts_GK)
        return torch.cat(sums), torch.cat(parts)


def _rows(logits_CV: Tensor) -> int:
    """How many rows of these logits are worked on at a time."""
    at_once = BLOCK_BYTES.get(logits_CV.device.type, BLOCK_BYTES["cuda"])
    return max(1, at_once // (logits_CV.itemsize * logits_CV.shape[1]))
