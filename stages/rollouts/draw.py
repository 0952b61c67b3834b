"""Drawing tokens from logits with one uniform number each.

B rows, V vocabulary. A token is the inverse of the cumulative distribution at the row's number, so it depends
on the row's logits and number only: not on the batch around it and on no generator's state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from stages.rollouts.requests import SamplingConfig

RESOLUTION = 2.0**52
"""Probabilities become integers of so many steps: their sums are exact, in any order and on any device."""


def uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """[B, length] float64 in [0, 1): row b holds the first draws of Philox with key seeds[b]."""
    draws = numpy.empty((len(seeds), length))
    for row, seed in enumerate(seeds):
        numpy.random.Generator(numpy.random.Philox(key=seed)).random(out=draws[row])
    return torch.from_numpy(draws)


@dataclass(frozen=True)
class Drawn:
    """One token a row."""

    tokens_B: Tensor
    logprobs_B: Tensor
    """Under the distribution that the settings make of the logits."""
    model_logprobs_B: Tensor
    """Under the softmax of the logits as they are."""
    free_logprobs_B: Tensor | None = None
    """Among all tokens at this temperature; None: all are allowed."""


def draw(
    logits_BV: Tensor,
    uniforms_B: Tensor,
    settings: SamplingConfig,
    seen_BV: Tensor | None = None,
    allowed_BV: Tensor | None = None,
) -> Drawn:
    """The token at each row's number. `seen_BV`: bool, the tokens that the repetition penalty is for; `allowed_BV`:
    those that may be drawn, None: all."""
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    changed_BV = logits_BV
    if settings.repetition_penalty != 1.0:
        assert seen_BV is not None
        changed_BV = penalized(logits_BV, seen_BV, settings.repetition_penalty)
    free_BV = changed_BV
    if allowed_BV is not None:
        changed_BV = changed_BV.masked_fill(~allowed_BV, -math.inf)
    if settings.temperature == 0.0:
        tokens_B = changed_BV.argmax(1)
        logprobs_B = _at(changed_BV, tokens_B) - changed_BV.logsumexp(1)
    else:
        tokens_B, logprobs_B = _draw(changed_BV, uniforms_B, settings)
    if not settings.changes_the_distribution():
        return Drawn(tokens_B, logprobs_B, logprobs_B)
    free_B = None if allowed_BV is None else _among_all(free_BV, tokens_B, settings.temperature or 1.0)
    return Drawn(tokens_B, logprobs_B, _among_all(logits_BV, tokens_B, 1.0), free_B)


def _among_all(logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> Tensor:
    """[B] log-probabilities, nothing left out."""
    scaled_BV = logits_BV if temperature == 1.0 else logits_BV / temperature
    return _at(scaled_BV, tokens_B) - scaled_BV.logsumexp(1)


def penalized(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Less likely by the penalty where `seen`, as in CTRL (arXiv:1909.05858) and transformers."""
    less_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, less_BV, logits_BV)


def _draw(logits_BV: Tensor, uniforms_B: Tensor, settings: SamplingConfig) -> tuple[Tensor, Tensor]:
    """(tokens [B], their log-probabilities [B])."""
    logits_BV = logits_BV - logits_BV.amax(1, keepdim=True)
    if settings.temperature != 1.0:
        logits_BV.div_(settings.temperature)
    side = math.isqrt(logits_BV.shape[1] - 1) + 1
    # padded with impossible tokens to a square, see inverse_cdf
    weights_BV = logits_BV.new_empty(logits_BV.shape[0], side * side)
    weights_BV[:, logits_BV.shape[1] :] = 0
    torch.exp(logits_BV, out=weights_BV[:, : logits_BV.shape[1]])
    _filter(weights_BV, settings)
    tokens_B = inverse_cdf(weights_BV.view(-1, side, side), uniforms_B)
    # NaN logits give a token of the padding; the caller finds them by their log-probability
    tokens_B.clamp_(max=logits_BV.shape[1] - 1)
    return tokens_B, _at(logits_BV, tokens_B) - weights_BV.sum(1).log()


def inverse_cdf(weights_BSS: Tensor, uniforms_B: Tensor) -> Tensor:
    """[B]: the first v of S x S whose cumulative weight exceeds u times the sum of the weights.

    First the block of S tokens, then the token in it: a running sum over S twice instead of once over S^2.
    """
    side = weights_BSS.shape[2]
    steps_BS = _steps(weights_BSS.sum(2))
    cumulative_BS, target_B, block_B = _choose(steps_BS, uniforms_B)
    # how far into the block's weight the number falls, in [0, 1): a uniform number again
    chosen_B = _at(steps_BS, block_B)
    before_B = _at(cumulative_BS, block_B) - chosen_B
    inside_B = (target_B - before_B) / chosen_B.double()
    weights_BS = weights_BSS.gather(1, block_B[:, None, None].expand(-1, 1, side))[:, 0]
    *_, token_B = _choose(_steps(weights_BS), inside_B)
    return block_B * side + token_B


def _choose(steps_BS: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(running sums [B, S], [B] where the number falls among them, [B] index chosen)."""
    cumulative_BS = steps_BS.cumsum(1)
    total_B = cumulative_BS[:, -1]
    target_B = (uniforms_B * total_B).long().minimum(total_B - 1)
    # NaN logits give no index in range; the caller finds them by their log-probability
    index_B = torch.searchsorted(cumulative_BS, target_B[:, None], right=True)[:, 0]
    return cumulative_BS, target_B, index_B.clamp_(0, steps_BS.shape[1] - 1)


def _steps(weights_BS: Tensor) -> Tensor:
    """[B, S] int64, in proportion to the weights."""
    wide_BS = weights_BS.double()
    return (wide_BS * (RESOLUTION / wide_BS.sum(1, keepdim=True))).long()


def _filter(weights_BV: Tensor, settings: SamplingConfig) -> None:
    """Set to zero, in place, what top_k, top_p and min_p leave out. The largest weight of a row is 1 and
    stays.
    """
    if 0 < settings.top_k < weights_BV.shape[1]:
        least_B1 = weights_BV.topk(settings.top_k, dim=1).values[:, -1:]
        weights_BV.masked_fill_(weights_BV < least_B1, 0.0)
    if settings.top_p < 1.0:
        sorted_BV, order_BV = weights_BV.sort(dim=1, descending=True, stable=True)
        steps_BV = _steps(sorted_BV)
        cumulative_BV = steps_BV.cumsum(1)
        above_BV = cumulative_BV - steps_BV
        dropped_BV = above_BV >= settings.top_p * cumulative_BV[:, -1:].double()
        weights_BV.masked_fill_(torch.zeros_like(dropped_BV).scatter(1, order_BV, dropped_BV), 0.0)
    if settings.min_p > 0.0:
        weights_BV.masked_fill_(weights_BV < settings.min_p, 0.0)


def _at(values_BV: Tensor, index_B: Tensor) -> Tensor:
    return values_BV.gather(1, index_B[:, None])[:, 0]
