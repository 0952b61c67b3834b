"""Losses of each token's own log-probability with a weighted entropy beside it: gradients formed on the way forward.

N positions, C positions of a chunk, H hidden size, V vocabulary. With p the softmax of logits z, y the target and
E = -sum_v p_v log p_v the entropy:

    d E / d z_v = -p_v (log p_v + E)

so the slopes of loss and entropy are one matrix, and three products of [N, V] x H are enough (two where the head is
frozen, one without gradients), as without the entropy. What it costs are passes over [C, V].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.losses.head import ChunkedHead, Head, chunk_length
from stages.losses.head_gradient import FormedGradient, HeadGradient
from stages.losses.logprobs import ChunkScores, TokenScores, Wanted, keep_scores, room_for_scores
from stages.losses.token_loss import TokenLossFunction, losses_and_slopes


def linear_token_entropy_loss(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    token_loss: TokenLossFunction | None,
    entropy_weights_N: Tensor,
    *,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, TokenScores]:
    """(sum of `token_loss` + entropy weight x entropy over all positions, the tokens' scores without a gradient).

    Exact gradients of the sum for hidden states, weight and bias, whichever need one; none for the weights. As
    `linear_token_loss` in all else; without a `token_loss` the sum is of the entropies alone. Raises ValueError for
    shapes that do not fit.
    """
    head.check(hidden_NH, targets_N)
    head.check(hidden_NH, entropy_weights_N)
    settings = _Settings(
        form=head.form,
        token_loss=token_loss or _nothing,
        weights_N=entropy_weights_N.detach(),
        longest=chunk_tokens or chunk_length(head),
        wanted=Wanted.of(hidden_NH, head, with_entropy=True),
    )
    with torch.autocast(hidden_NH.device.type, enabled=False):
        loss, *scores = _LinearTokenEntropyLoss.apply(hidden_NH, head.weight_VH, head.bias_V, targets_N, settings)
    return loss, TokenScores(*scores)


def _nothing(logprobs_C: Tensor, part: slice) -> Tensor:
    return logprobs_C * 0.0


@dataclass(frozen=True)
class _Settings:
    form: Callable[[Tensor, Tensor | None], Head]
    token_loss: TokenLossFunction
    weights_N: Tensor
    longest: int
    wanted: Wanted


class _LinearTokenEntropyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, settings: _Settings
    ) -> tuple[Tensor | None, ...]:
        head, wanted = settings.form(weight_VH, bias_V), settings.wanted
        room = ChunkedHead(head, len(targets_N), settings.longest)
        scores = room_for_scores(room, hidden_NH, wanted)
        losses_N = torch.empty_like(scores.logprobs_N)
        grad_hidden_NH = torch.empty_like(hidden_NH) if wanted.hidden else None
        gradient = HeadGradient(head, weight=wanted.weight, bias=wanted.bias)
        for part in room.parts:
            hidden_CH, targets_C, weights_C = hidden_NH[part], targets_N[part], settings.weights_N[part]
            logits = _ChunkLogits(room, hidden_CH, targets_C)
            keep_scores(scores, part, logits.scores())
            losses_C, grad_C = losses_and_slopes(settings.token_loss, logits.logprobs_C, part)
            losses_N[part] = losses_C + weights_C * logits.entropy_C
            if wanted.hidden or wanted.head:
                slopes_CV, scales_C, at_target_C = logits.slopes(grad_C, weights_C.to(grad_C.dtype))
                if grad_hidden_NH is not None:
                    rows_CH = room.weight_VH.index_select(0, targets_C).to(at_target_C.dtype)
                    direction_CH = room.to_hidden(slopes_CV).mul_(scales_C[:, None])
                    grad_hidden_NH[part] = direction_CH.addcmul_(rows_CH, at_target_C[:, None])
                if wanted.head:
                    gradient.add(slopes_CV, scales_C, hidden_CH)
                    gradient.add_rows(targets_C, at_target_C, hidden_CH)
                del slopes_CV
            del logits  # its memory is the next one's
        ctx.formed = FormedGradient(grad_hidden_NH, gradient)
        ctx.mark_non_differentiable(*(score for score in scores if score is not None))
        return losses_N.sum(), *scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.formed.take(grad), None, None


class _ChunkLogits:
    """The logits of a chunk below the highest, x, and their exponentials; the target's kept apart, as in `logprobs`."""

    def __init__(self, room: ChunkedHead, hidden_CH: Tensor, targets_C: Tensor) -> None:
        self.room, at_C1 = room, targets_C[:, None]
        logits_CV = room.logits(hidden_CH)
        highest_C1 = logits_CV.amax(1, keepdim=True)
        target_C1 = logits_CV.gather(1, at_C1)
        self.target_C, self.above_C = target_C1[:, 0], (target_C1 - highest_C1)[:, 0]
        self.below_CV = logits_CV.sub_(highest_C1)
        self.others_CV = self.below_CV.exp().scatter_(1, at_C1, 0.0)
        own_C, rest_C = self.above_C.exp(), self.others_CV.sum(1)
        self.sums_C = rest_C + own_C
        self.log_sums_C = self.sums_C.log()
        self.share_C, self.probability_C = rest_C / self.sums_C, own_C / self.sums_C
        self.logprobs_C = self.above_C - self.log_sums_C
        mean_C = (torch.linalg.vecdot(self.others_CV, self.below_CV) + own_C * self.above_C) / self.sums_C
        self.entropy_C = (self.log_sums_C - mean_C).clamp_(min=0)  # rounding must not make it negative

    def scores(self) -> ChunkScores:
        """What is kept of the tokens; nothing of a slope."""
        nothing = self.others_CV, self.sums_C, self.share_C, None
        return ChunkScores(self.logprobs_C, self.above_C == 0, *nothing, self.entropy_C, None)

    def slopes(self, grad_C: Tensor, weights_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """d (grad logprob + weight entropy) / d (h W^T + b): ([C, V] without the target's, what each row of it is to
        be multiplied by [C], the target's [C]). Once a chunk."""
        head, surplus_C = self.room.head, self.entropy_C - self.log_sums_C
        slopes_CV = self.below_CV.mul_(weights_C[:, None]).add_((weights_C * surplus_C + grad_C)[:, None])
        slopes_CV.mul_(self.others_CV)
        at_target_C = grad_C * self.share_C - weights_C * self.probability_C * (self.above_C + surplus_C)
        if head.softcap is not None:
            tanh_C = self.target_C * (head.temperature / head.softcap)
            at_target_C = at_target_C * (1 - tanh_C.square())
            self.room.apply_softcap_slope(slopes_CV)
        return slopes_CV, -head.slope / self.sums_C, at_target_C * head.slope
