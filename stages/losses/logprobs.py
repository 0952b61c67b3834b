"""Log-probabilities of given tokens from hidden states, without ever holding all logits.

N positions, C positions of a chunk, H hidden size, V vocabulary. With z = slope (h W^T + b) (see `Head`), p its
softmax and y the target:

    d logprob / d h = slope (W_y - p W)        d logprob / d W = slope (e_y - p)^T h

so a chunk takes one product for its logits, one for p W and one for the weight's gradient, and no pass over [C, V]
but maximum, exponential and sum. The target's own row is kept apart, with weight 1 - p_y, from the others'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.losses.head import ChunkedHead, Head, chunk_length
from stages.losses.head_gradient import HeadGradient

KEPT_BYTES = 256 * 2**20
"""Probabilities up to this size are kept for the backward pass; larger ones are computed again in it."""


class TokenScores(NamedTuple):
    """What is known of every target token."""

    logprobs_N: Tensor
    entropy_N: Tensor | None
    """In nats; no gradient. None where it was not asked for."""
    is_likeliest_N: Tensor
    """bool: no token has a higher probability."""
    log_squares_N: Tensor | None = None
    """log sum_v p_v^2, the log-probability of two draws being equal; no gradient. None where not asked for."""


@dataclass(frozen=True)
class Wanted:
    """What a pass over the chunks must leave behind."""

    hidden: bool
    weight: bool
    bias: bool
    entropy: bool
    squares: bool = False

    @classmethod
    def of(cls, hidden_NH: Tensor, head: Head, with_entropy: bool, with_squares: bool = False) -> Wanted:
        """Gradients of what needs one, where gradients are computed at all."""
        on = torch.is_grad_enabled()
        bias = head.bias_V is not None and head.bias_V.requires_grad
        hidden, weight = on and hidden_NH.requires_grad, on and head.weight_VH.requires_grad
        return cls(hidden, weight, on and bias, with_entropy, with_squares)

    @property
    def head(self) -> bool:
        """A gradient of weight or bias."""
        return self.weight or self.bias

    @property
    def direction(self) -> bool:
        """The slope along the hidden state: its gradient, and the way to the entropy."""
        return self.hidden or self.entropy


class ChunkScores(NamedTuple):
    """A chunk after its logits: d logprob / d (h W^T + b) = target_C at the target, -scales_C others_CV elsewhere."""

    logprobs_C: Tensor
    is_likeliest_C: Tensor
    others_CV: Tensor
    """0 at the target."""
    scales_C: Tensor
    target_C: Tensor
    direction_CH: Tensor | None
    """d logprob / d h."""
    entropy_C: Tensor | None
    log_squares_C: Tensor | None


def score_chunk(room: ChunkedHead, hidden_CH: Tensor, targets_C: Tensor, wanted: Wanted) -> ChunkScores:
    """Scores of one chunk; `others_CV` is the room's memory, until its next chunk."""
    head, at_C1 = room.head, targets_C[:, None]
    logits_CV = room.logits(hidden_CH)
    highest_C1 = logits_CV.amax(1, keepdim=True)
    targets_C1 = logits_CV.gather(1, at_C1)
    above_C = (targets_C1 - highest_C1)[:, 0]
    others_CV = logits_CV.sub_(highest_C1).exp_().scatter_(1, at_C1, 0.0)
    # 1 - p of the target is the others' share: nothing cancels where it is almost certain
    rest_C = others_CV.sum(1)
    sums_C = rest_C + above_C.exp()
    logprobs_C, share_C, scales_C = above_C - sums_C.log(), rest_C / sums_C, head.slope / sums_C
    log_squares_C = None
    if wanted.squares:
        squares_C = torch.linalg.vecdot(others_CV, others_CV) + (2 * above_C).exp()
        log_squares_C = squares_C.log() - 2 * sums_C.log()
    chunk = ChunkScores(logprobs_C, above_C == 0, others_CV, scales_C, share_C * head.slope, None, None, log_squares_C)
    if not (wanted.head or wanted.direction):
        return chunk
    spread_C = None
    if head.softcap is not None:
        if wanted.entropy:
            spread_C = share_C * targets_C1[:, 0] - room.mean_logits(others_CV) / sums_C
        tanh_C = targets_C1[:, 0] * (head.temperature / head.softcap)
        chunk = chunk._replace(target_C=chunk.target_C * (1 - tanh_C.square()))
        room.apply_softcap_slope(others_CV)
    return _with_direction(room, chunk, hidden_CH, targets_C, spread_C, wanted) if wanted.direction else chunk


def _with_direction(
    room: ChunkedHead, chunk: ChunkScores, hidden_CH: Tensor, targets_C: Tensor, spread_C: Tensor | None, wanted: Wanted
) -> ChunkScores:
    """The chunk with its direction, and its entropy -logprob + (z_y - E[z]), which follows without another pass."""
    target_C1, scales_C1 = chunk.target_C[:, None], chunk.scales_C[:, None]
    rows_CH = room.weight_VH.index_select(0, targets_C)
    direction_CH = room.to_hidden(chunk.others_CV).mul_(-scales_C1).addcmul_(rows_CH.to(target_C1.dtype), target_C1)
    if not wanted.entropy:
        return chunk._replace(direction_CH=direction_CH)
    if spread_C is None:
        spread_C = (hidden_CH * direction_CH).sum(1)
        if (bias_V := room.head.bias_V) is not None:
            bias_V = bias_V.to(direction_CH.dtype)
            spread_C = spread_C + chunk.target_C * bias_V[targets_C] - chunk.scales_C * (chunk.others_CV @ bias_V)
    # rounding must not make it negative
    return chunk._replace(direction_CH=direction_CH, entropy_C=(spread_C - chunk.logprobs_C).clamp_(min=0))


def linear_logprobs(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    *,
    with_entropy: bool = True,
    with_squares: bool = False,
    chunk_tokens: int | None = None,
) -> TokenScores:
    """Log-probability of each target, entropy of its distribution, and whether it is the likeliest token.

    log_softmax(z)[n, target_n] with z as in `Head`. For losses that need all log-probabilities before the gradient of
    any is known; for others `linear_token_loss` takes one product less. Exact gradients for hidden states, weight and
    bias, whichever need one. Products of [N, V] x H: one without gradients; two where only the hidden states need one
    (or for the entropy); with the weight's gradient three where the probabilities fit into KEPT_BYTES, else four.
    Raises ValueError for shapes that do not fit.
    """
    head.check(hidden_NH, targets_N)
    wanted = Wanted.of(hidden_NH, head, with_entropy, with_squares)
    positions = len(targets_N)
    keep = wanted.head and positions * head.vocabulary * head.sum_type.itemsize <= KEPT_BYTES
    longest = chunk_tokens or (max(1, positions) if keep else chunk_length(head))
    form = head.form
    with torch.autocast(hidden_NH.device.type, enabled=False):
        return TokenScores(
            *_LinearLogprobs.apply(hidden_NH, head.weight_VH, head.bias_V, targets_N, form, longest, wanted)
        )


class _LinearLogprobs(torch.autograd.Function):
    """The hidden states' gradient needs the direction of the forward pass alone, the weight's also p."""

    @staticmethod
    def forward(  # noqa: PLR0913 - autograd takes tensors one by one
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        form: Callable[[Tensor, Tensor | None], Head],
        longest: int,
        wanted: Wanted,
    ) -> tuple[Tensor | None, ...]:
        room = ChunkedHead(form(weight_VH, bias_V), len(targets_N), longest)
        scores = room_for_scores(room, hidden_NH, wanted)
        directions_NH = hidden_NH.new_empty(hidden_NH.shape, dtype=room.head.sum_type) if wanted.hidden else None
        chunk = None
        for part in room.parts:
            del chunk  # its memory is the next one's
            chunk = score_chunk(room, hidden_NH[part], targets_N[part], wanted)
            keep_scores(scores, part, chunk)
            if directions_NH is not None:
                assert chunk.direction_CH is not None
                directions_NH[part] = chunk.direction_CH
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, directions_NH)
        ctx.form, ctx.longest, ctx.wanted = form, longest, wanted
        ctx.kept = chunk if wanted.head and len(room.parts) == 1 else None
        ctx.mark_non_differentiable(*(score for score in scores[1:] if score is not None))
        return tuple(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, targets_N, directions_NH = ctx.saved_tensors
        wanted, chunk = ctx.wanted, ctx.kept
        ctx.kept = None  # or it would live as long as the graph, through the whole backward pass
        grad_hidden_NH = None if directions_NH is None else (directions_NH * grad_N[:, None]).to(hidden_NH.dtype)
        head: Head = ctx.form(weight_VH, bias_V)
        gradient = HeadGradient(head, weight=wanted.weight, bias=wanted.bias, factor=1.0)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            if chunk is not None:
                add_chunk(gradient, chunk, grad_N, hidden_NH, targets_N)
            elif wanted.head:
                again = replace(wanted, hidden=False, entropy=False, squares=False)
                room = ChunkedHead(head, len(targets_N), ctx.longest)
                for part in room.parts:
                    del chunk
                    chunk = score_chunk(room, hidden_NH[part], targets_N[part], again)
                    add_chunk(gradient, chunk, grad_N[part], hidden_NH[part], targets_N[part])
        return grad_hidden_NH, *gradient.result(), None, None, None, None


def add_chunk(gradient: HeadGradient, chunk: ChunkScores, grad_C: Tensor, hidden_CH: Tensor, targets_C: Tensor) -> None:
    """Add what a chunk gives to weight and bias, `grad_C` being d loss / d logprob."""
    gradient.add(chunk.others_CV, -chunk.scales_C * grad_C, hidden_CH)
    gradient.add_rows(targets_C, chunk.target_C * grad_C, hidden_CH)


def room_for_scores(room: ChunkedHead, hidden_NH: Tensor, wanted: Wanted) -> TokenScores:
    """Scores of all positions, to be filled in."""
    positions = len(hidden_NH)
    values = hidden_NH.new_empty(3, positions, dtype=room.head.sum_type)
    is_likeliest_N = torch.empty(positions, dtype=torch.bool, device=hidden_NH.device)
    entropy_N, log_squares_N = values[1] if wanted.entropy else None, values[2] if wanted.squares else None
    return TokenScores(values[0], entropy_N, is_likeliest_N, log_squares_N)


def keep_scores(scores: TokenScores, part: slice, chunk: ChunkScores) -> None:
    """Fill in the scores of a chunk."""
    scores.logprobs_N[part] = chunk.logprobs_C
    scores.is_likeliest_N[part] = chunk.is_likeliest_C
    if scores.entropy_N is not None and chunk.entropy_C is not None:
        scores.entropy_N[part] = chunk.entropy_C
    if scores.log_squares_N is not None and chunk.log_squares_C is not None:
        scores.log_squares_N[part] = chunk.log_squares_C
