"""Losses that are sums of a function of each token's own log-probability: gradients formed on the way forward.

Where the loss of a token needs no other token's log-probability, d loss / d logprob is known as soon as a chunk's
logits are, and the gradients of hidden states, weight and bias can be added up at once: three products of [N, V] x H
altogether, two where the head is frozen, one without gradients. (Hsu et al., arXiv:2410.10989, sec. 3.2, do this for
the cross-entropy.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.losses.head import ChunkedHead, Head, chunk_length
from stages.losses.head_gradient import FormedGradient, HeadGradient
from stages.losses.logprobs import TokenScores, Wanted, add_chunk, keep_scores, room_for_scores, score_chunk

TokenLossFunction = Callable[[Tensor, slice], Tensor]
"""(log-probabilities [C] of a chunk, its slice of the N positions) -> losses [C]; differentiable torch operations."""


def linear_token_loss(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    token_loss: TokenLossFunction,
    *,
    with_entropy: bool = True,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, TokenScores]:
    """(sum of `token_loss` over all positions, what is known of the tokens, without a gradient).

    Exact gradients of the sum for hidden states, weight and bias, whichever need one; they are formed here, so
    backward() only multiplies them by what comes in, and works once. `token_loss` may depend on everything but other
    positions' log-probabilities, and is called once a chunk. Raises ValueError for shapes that do not fit.
    """
    head.check(hidden_NH, targets_N)
    wanted = Wanted.of(hidden_NH, head, with_entropy)
    form = head.form
    longest = chunk_tokens or chunk_length(head)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        loss, *scores = _LinearTokenLoss.apply(
            hidden_NH, head.weight_VH, head.bias_V, targets_N, token_loss, form, longest, wanted
        )
    return loss, TokenScores(*scores)


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 - autograd takes tensors one by one
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        token_loss: TokenLossFunction,
        form: Callable[[Tensor, Tensor | None], Head],
        longest: int,
        wanted: Wanted,
    ) -> tuple[Tensor | None, ...]:
        head = form(weight_VH, bias_V)
        room = ChunkedHead(head, len(targets_N), longest)
        scores = room_for_scores(room, hidden_NH, wanted)
        losses_N = torch.empty_like(scores.logprobs_N)
        grad_hidden_NH = torch.empty_like(hidden_NH) if wanted.hidden else None
        gradient = HeadGradient(head, weight=wanted.weight, bias=wanted.bias)
        for part in room.parts:
            hidden_CH, targets_C = hidden_NH[part], targets_N[part]
            chunk = score_chunk(room, hidden_CH, targets_C, wanted)
            keep_scores(scores, part, chunk)
            losses_N[part], grad_C = losses_and_slopes(token_loss, chunk.logprobs_C, part)
            if grad_hidden_NH is not None and chunk.direction_CH is not None:
                grad_hidden_NH[part] = chunk.direction_CH.mul_(grad_C[:, None])
            if wanted.head:
                add_chunk(gradient, chunk, grad_C, hidden_CH, targets_C)
            del chunk  # its memory is the next one's
        ctx.formed = FormedGradient(grad_hidden_NH, gradient)
        ctx.mark_non_differentiable(*(score for score in scores if score is not None))
        return losses_N.sum(), *scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.formed.take(grad), None, None, None, None, None


def losses_and_slopes(token_loss: TokenLossFunction, logprobs_C: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """(losses [C], d loss / d logprob [C]) of a chunk."""
    with torch.enable_grad():
        leaf_C = logprobs_C.detach().requires_grad_()
        losses_C = token_loss(leaf_C, part)
        if losses_C.shape != leaf_C.shape:
            raise ValueError(f"token_loss gave losses {tuple(losses_C.shape)} for {len(leaf_C)} log-probabilities")
        (slopes_C,) = torch.autograd.grad(losses_C.sum(), leaf_C)
    return losses_C.detach(), slopes_C
