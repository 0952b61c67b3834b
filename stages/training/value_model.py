"""A language model that also says what is to be expected: a value of every position, for PPO."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stages.losses.logprobs import TokenScores
from stages.losses.token_loss import TokenLossFunction, linear_token_loss
from stages.training.batch import TokenBatch
from stages.training.model import Scorer, token_logprobs
from stages.training.objective import Readout


class ActorCritic(Scorer):
    """A policy whose last hidden states are also read by a linear value head, which is no part of the exported model.

    The head starts at zero: nothing is expected of any position yet, and no random number decides which.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.value_head = nn.Linear(int(self.transformers_model.config.hidden_size), 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def values(self, hidden_NH: Tensor) -> Tensor:
        """[N] of the positions with these hidden states."""
        values_N1: Tensor = self.value_head(hidden_NH.to(self.value_head.weight.dtype))
        return values_N1[:, 0].float()


def logprobs_and_values(batch: TokenBatch, *, temperature: float) -> Readout:
    """A readout: (TokenScores of the asked-for tokens, values [N] of the positions before them)."""
    logprobs = token_logprobs(batch, temperature=temperature)

    def read(hidden_NH: Tensor, scorer: nn.Module) -> tuple[TokenScores, Tensor]:
        assert isinstance(scorer, ActorCritic)
        return logprobs.read(hidden_NH, scorer), scorer.values(hidden_NH)

    return Readout(batch.source_N, read)


def policy_loss_and_values(batch: TokenBatch, token_loss: TokenLossFunction, *, temperature: float) -> Readout:
    """A readout: (sum of `token_loss`, TokenScores without a gradient, values [N] with one)."""

    def read(hidden_NH: Tensor, scorer: nn.Module) -> tuple[Tensor, TokenScores, Tensor]:
        assert isinstance(scorer, ActorCritic)
        loss, scores = linear_token_loss(hidden_NH, scorer.head(temperature), batch.target_N, token_loss)
        return loss, scores, scorer.values(hidden_NH)

    return Readout(batch.source_N, read)


def per_branch(batch: TokenBatch, values_N: Tensor) -> list[list[float]]:
    """The values of every branch's asked-for tokens."""
    lengths: list[int] = batch.tokens_per_branch().tolist()
    return [part.tolist() for part in torch.split(values_N.cpu(), lengths)]
