"""The objective of supervised fine-tuning: a loss of every asked-for token; its unit is a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.losses.host_numbers import on_device
from stages.losses.supervised import nll
from stages.seeds import generator
from stages.training.batch import Branch, Group, TokenBatch
from stages.training.metrics import Mean
from stages.training.model import token_losses
from stages.training.objective import Forward, Window, Windows, WindowsAround

if TYPE_CHECKING:
    from stages.data.tokenize import TokenizedSequence


def sequence_group(row: TokenizedSequence, data: Any = None) -> Group:
    """A whole row, without a shared prefix."""
    return Group(row.row_id, (), (Branch(row.token_ids, row.loss_mask),), data)


def asked_tokens(group: Group) -> int:
    """Number of tokens of a group whose log-probability is asked for."""
    return sum(branch.asked for branch in group.branches)


@dataclass(frozen=True)
class RowSettings:
    """What is special about a row; None as a group's data: nothing."""

    weight: float = 1.0
    """A row of weight 2 counts as two rows."""
    noise_key: tuple[int | str, ...] = ()
    """What the noise on its embeddings is drawn from."""


class TokenLoss:
    """Sum of a loss over asked-for tokens, each times its row's weight; the loop divides by the weighted tokens."""

    metric_names: Sequence[str] = ("entropy", "mean_token_accuracy")

    def __init__(self, loss: Callable[[Tensor], Tensor] = nll, neftune_noise_alpha: float | None = None) -> None:
        self.loss, self.noise_alpha = loss, neftune_noise_alpha

    def count(self, group: Group) -> float:
        """Asked-for tokens, weighted."""
        return asked_tokens(group) * weight_of(group)

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(weighted sum of token losses, TRL's SFT metrics)."""
        weights_N = row_weights(batch)

        def token_loss(logprobs_C: Tensor, part: slice) -> Tensor:
            losses_C = self.loss(logprobs_C)
            return losses_C if weights_N is None else losses_C * weights_N[part].to(losses_C.dtype)

        if self.noise_alpha is not None and any(group.data is not None for group in batch.groups):
            batch = replace(batch, noise=EmbeddingNoise(batch, self.noise_alpha))
        loss, scores = forward(batch, token_losses(batch, token_loss))
        metrics = {
            "entropy": Mean(scores.entropy_N.sum(), len(scores.entropy_N)),
            "mean_token_accuracy": Mean(scores.is_likeliest_N.sum(), len(scores.is_likeliest_N)),
        }
        return loss, metrics


def weight_of(group: Group) -> float:
    """Of a row, in the loss."""
    return 1.0 if group.data is None else float(group.data.weight)


def row_weights(batch: TokenBatch) -> Tensor | None:
    """[N] the weight of every asked-for token's row; None where all are 1."""
    weights = [weight_of(group) for group in batch.groups for _ in group.branches]
    if all(weight == 1.0 for weight in weights):
        return None
    return on_device(weights, batch.branch_N.device)[batch.branch_N]


class EmbeddingNoise:
    """NEFTune: uniform noise on the embeddings of training rows, of size alpha / sqrt(length x hidden size).

    Jain et al., arXiv:2310.05914, algorithm 1, with a row's own length (TRL takes that of the padded batch, so that
    noise shrinks with padding). Drawn from each row's own key: neither micro-batches nor processes change it.
    """

    def __init__(self, batch: TokenBatch, alpha: float) -> None:
        self.batch, self.alpha = batch, alpha

    def __call__(self, embeddings_BTH: Tensor) -> Tensor:
        """The embeddings with noise, of the same shape."""
        hidden = embeddings_BTH.shape[2]
        noise_BTH = torch.zeros((*embeddings_BTH.shape[:2], hidden))
        rows = noise_BTH.flatten(0, 1)
        for group, place in zip(self.batch.groups, self.batch.row_starts(), strict=True):
            length = group.length
            size = self.alpha / (length * hidden) ** 0.5
            seed, *parts = group.data.noise_key
            draws = generator(seed, *parts).uniform(-size, size, (length, hidden))
            rows[place : place + length] = torch.from_numpy(draws)
        return embeddings_BTH + noise_BTH.to(embeddings_BTH, non_blocking=True)


class NoisyWindows(WindowsAround):
    """Windows whose rows draw new noise at every step, which follows from the step."""

    def __init__(self, windows: Windows, seed: int) -> None:
        super().__init__(windows)
        self.seed = seed

    def window(self, step: int) -> Window:
        """The groups of a step, each with the key of its noise."""
        window = self.windows.window(step)
        return replace(window, groups=[self._with_noise(group, step) for group in window.groups])

    def _with_noise(self, group: Group, step: int) -> Group:
        settings = group.data or RowSettings()
        return replace(group, data=replace(settings, noise_key=(self.seed, "neftune", step, group.row_id)))
