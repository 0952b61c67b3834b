"""The divergence of a student from a teacher, from hidden states: gradients formed on the way forward.

N positions, C positions of a chunk, H hidden size, V vocabulary. A chunk takes one product for each model's logits and
two for the gradients of the student's hidden states and weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.losses.distillation import Divergence
from stages.losses.head import ChunkedHead, Head, chunk_length, parts_of
from stages.losses.head_gradient import FormedGradient, HeadGradient
from stages.losses.logprobs import Wanted

BLOCK_BYTES = {"cpu": 2**20, "cuda": 256 * 2**20}
"""Logits that are turned into slopes at a time, so that the passes over them stay within the cache."""

_LOWEST = -1e30
"""For biases of -inf: the slopes need finite logits."""


def linear_divergence(
    hidden_NH: Tensor,
    head: Head,
    teacher_hidden_NH: Tensor,
    teacher_head: Head,
    divergence: Divergence,
    *,
    weights_N: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum of weight x divergence over all positions, divergences [N] without a gradient).

    Exact gradients of the sum for the student's hidden states, weight and bias, whichever need one; nothing of the
    teacher, nor the weights (1 where not given), gets one. backward() works once. A temperature is part of the heads;
    there is no factor temperature^2 (as in TRL). Raises ValueError for shapes that do not fit.
    """
    if head.vocabulary != teacher_head.vocabulary:
        raise ValueError(
            f"student and teacher have heads of {head.vocabulary} and {teacher_head.vocabulary} tokens; "
            "they must be equal"
        )
    head.check(hidden_NH, teacher_hidden_NH)
    teacher_head.check(teacher_hidden_NH, hidden_NH)
    longest = chunk_tokens or chunk_length(head)
    compare = over_all_tokens(logits_in_parts(teacher_hidden_NH, teacher_head, longest), divergence)
    return compared(hidden_NH, head, compare, weights_N=weights_N, longest=longest)


Compare = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""(which positions, student's logits [C, V]) -> as `divergence_slopes` gives them, the slopes over the logits."""
LogitsOf = Callable[[slice], Tensor]
"""(which positions) -> logits [C, V], the caller's to change."""


def logits_in_parts(hidden_NH: Tensor, head: Head, longest: int) -> LogitsOf:
    """Of a teacher, for at most `longest` positions at a time."""
    room, states_NH = ChunkedHead(finite(head.detached()), len(hidden_NH), longest), hidden_NH.detach()
    return lambda part: room.logits(states_NH[part])


def over_all_tokens(teacher: LogitsOf, divergence: Divergence) -> Compare:
    """The divergence of the whole distributions."""
    return lambda part, student_CV: slopes_in_blocks(student_CV, teacher(part), divergence.slope)


def compared(
    hidden_NH: Tensor,
    head: Head,
    compare: Compare,
    *,
    weights_N: Tensor | None = None,
    longest: int,
    parts: Sequence[slice] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `linear_divergence`, from whatever `compare` compares with; it is called for at most `longest` positions, or
    for these `parts`, which are all positions in order."""
    settings = _Settings(
        form=head.form,
        compare=compare,
        longest=longest,
        parts=parts,
        wanted=Wanted.of(hidden_NH, head, with_entropy=False),
    )
    if weights_N is None:
        weights_N = hidden_NH.new_ones(len(hidden_NH), dtype=head.sum_type)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        loss, divergences_N = _LinearDivergence.apply(
            hidden_NH, head.weight_VH, head.bias_V, weights_N.detach(), settings
        )
    return loss, divergences_N


@dataclass(frozen=True)
class _Settings:
    form: Callable[[Tensor, Tensor | None], Head]
    """The student's head, given weight and bias."""
    compare: Compare
    longest: int
    parts: Sequence[slice] | None
    wanted: Wanted


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, weights_N: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor]:
        head, wanted = finite(settings.form(weight_VH, bias_V)), settings.wanted
        room = ChunkedHead(head, len(hidden_NH), settings.longest)
        divergences_N = hidden_NH.new_empty(len(hidden_NH), dtype=head.sum_type)
        grad_hidden_NH = torch.empty_like(hidden_NH) if wanted.hidden else None
        gradient = HeadGradient(head, weight=wanted.weight, bias=wanted.bias)
        for part in room.parts if settings.parts is None else settings.parts:
            slopes_CV = room.logits(hidden_NH[part])
            divergences_N[part], scales_C = settings.compare(part, slopes_CV)
            room.apply_softcap_slope(slopes_CV)
            scales_C = scales_C * weights_N[part] * head.slope
            if grad_hidden_NH is not None:
                grad_hidden_NH[part] = room.to_hidden(slopes_CV).mul_(scales_C[:, None])
            gradient.add(slopes_CV, scales_C, hidden_NH[part])
            del slopes_CV  # its memory is the next one's
        ctx.formed = FormedGradient(grad_hidden_NH, gradient)
        ctx.mark_non_differentiable(divergences_N)
        return (divergences_N * weights_N).sum(), divergences_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.formed.take(grad), None, None


def slopes_in_blocks(
    student_CV: Tensor, teacher_CV: Tensor, slope: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """`slope` of some rows at a time."""
    bytes_at_once = BLOCK_BYTES.get(student_CV.device.type, BLOCK_BYTES["cuda"])
    rows = max(1, bytes_at_once // (student_CV.itemsize * student_CV.shape[1]))
    blocks = [slope(student_CV[block], teacher_CV[block]) for block in parts_of(len(student_CV), rows)]
    divergences, scales = zip(*blocks, strict=True)
    return torch.cat(divergences), torch.cat(scales)


def finite(head: Head) -> Head:
    """With the lowest bias that slopes can take in the place of -inf."""
    return head if head.bias_V is None else replace(head, bias_V=head.bias_V.clamp(min=_LOWEST))
