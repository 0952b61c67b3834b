"""Readouts whose loss has the entropies of the tokens' distributions in it, with their gradient."""

from __future__ import annotations

from torch import Tensor, nn

from stages.losses.entropy_loss import linear_token_entropy_loss
from stages.losses.logprobs import TokenScores, linear_logprobs
from stages.losses.token_loss import TokenLossFunction
from stages.training.batch import TokenBatch
from stages.training.model import Scorer
from stages.training.objective import Readout


def token_losses_with_entropy(
    batch: TokenBatch, token_loss: TokenLossFunction, weights_N: Tensor, *, temperature: float = 1.0
) -> Readout:
    """(sum of `token_loss` + weight x entropy over the batch's asked-for tokens, their TokenScores, no gradient)."""

    def read(hidden_NH: Tensor, scorer: nn.Module) -> tuple[Tensor, TokenScores]:
        assert isinstance(scorer, Scorer)
        return linear_token_entropy_loss(hidden_NH, scorer.head(temperature), batch.target_N, token_loss, weights_N)

    return Readout(batch.source_N, read)


def token_logprobs_with_entropy(batch: TokenBatch, weights_N: Tensor, *, temperature: float = 1.0) -> Readout:
    """(sum of weight x entropy, TokenScores of the batch's asked-for tokens, log-probabilities with a gradient)."""

    def read(hidden_NH: Tensor, scorer: nn.Module) -> tuple[Tensor, TokenScores]:
        assert isinstance(scorer, Scorer)
        head = scorer.head(temperature)
        scores = linear_logprobs(hidden_NH, head, batch.target_N, with_entropy=False)
        total, known = linear_token_entropy_loss(hidden_NH, head, batch.target_N, None, weights_N)
        return total, scores._replace(entropy_N=known.entropy_N)

    return Readout(batch.source_N, read)
