"""How the token losses of a policy become the loss of a step.

A loss gives [N] tokens; an `Aggregation` says what one item is (a token or a sequence) and each token's weight. The
objective returns sum(loss * weight), the loop divides once by the items of the whole step, over all micro-batches and
ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Aggregation:
    """How token losses become the loss of a step: sum(loss * weight) / items."""

    unit: Literal["token", "sequence"]
    token_weights: Callable[[Tensor, int], Tensor]
    """(lengths_S, max_completion_length) -> [S], the weight of every token of the sequence."""

    def count(self, lengths_S: Tensor) -> int:
        """Items in a batch. A sequence whose tokens are all masked (length 0) still is an item, as in TRL."""
        return lengths_S.numel() if self.unit == "sequence" else int(lengths_S.sum())

    def weights(self, lengths_S: Tensor, sequence_N: Tensor, max_completion_length: int, dtype: torch.dtype) -> Tensor:
        """[N]: the weight of every token."""
        return self.token_weights(lengths_S.double(), max_completion_length).to(dtype).index_select(0, sequence_N)


def _one(lengths_S: Tensor, max_completion_length: int) -> Tensor:
    return lengths_S.new_ones(lengths_S.shape)


def _one_by_length(lengths_S: Tensor, max_completion_length: int) -> Tensor:
    return 1.0 / lengths_S.clamp(min=1)


def _one_by_longest(lengths_S: Tensor, max_completion_length: int) -> Tensor:
    return lengths_S.new_full(lengths_S.shape, 1.0 / max_completion_length)


AGGREGATIONS: dict[str, Aggregation] = {
    # over sequences, of the mean over tokens; arXiv:2402.03300
    "mean_of_means": Aggregation("sequence", _one_by_length),
    # over the tokens of the whole step; arXiv:2503.14476
    "token_mean": Aggregation("token", _one),
    # a constant denominator, which does not favour long wrong answers; arXiv:2503.20783
    "constant": Aggregation("sequence", _one_by_longest),
    # over sequences, of the sum over tokens: a loss counts in proportion to its length; arXiv:2602.05261
    "mean_of_sums": Aggregation("sequence", _one),
}
