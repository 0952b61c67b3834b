"""How evenly routers send tokens to experts: the load-balancing loss of mixtures of experts.

Letters: L layers with a router, P places of a forward pass, E experts, K sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOTALS = Callable[[Tensor], Tensor]
"""[P, E] values of places -> [K, E] their sums over the tokens of every sequence."""


def load_balance(logits: Sequence[Tensor], top_k: int, totals: TOTALS, tokens_K: Tensor) -> tuple[Tensor, Tensor]:
    """([K] the loss of every sequence, [L, E] how many tokens of all sequences went to each expert, for every layer).

    Of a sequence it is E sum_i f_i p_i: f_i the tokens sent to expert i and p_i the probability that the router gives
    it, both means over the sequence's tokens and over all layers (Fedus et al., arXiv:2101.03961, eq. 4 to 6, with
    `top_k` experts a token, so that balance is a value of `top_k`; layers taken together as in transformers'
    `load_balancing_loss_func`, which this equals for one sequence). f has no gradient. `logits`: [P, E] of every layer,
    or [B, T, E].
    """
    chosen, given = [], []
    for layer in logits:
        probabilities_PE = layer.flatten(0, -2).softmax(-1, dtype=torch.float32)
        with torch.no_grad():
            experts_Pk = probabilities_PE.topk(top_k, -1).indices
            chosen.append(totals(torch.zeros_like(probabilities_PE).scatter_(1, experts_Pk, 1.0)))
        given.append(totals(probabilities_PE))
    chosen_LKE, rows_K1 = torch.stack(chosen), len(logits) * tokens_K[:, None]
    f_KE, p_KE = chosen_LKE.sum(0) / rows_K1, torch.stack(given).sum(0) / rows_K1
    return f_KE.shape[1] * (f_KE * p_KE).sum(-1), chosen_LKE.sum(1)


def max_load(loads_LE: Tensor) -> float:
    """The share of the busiest expert of any layer, times the number of experts: 1 where all are as busy, at most
    E / top_k."""
    shares_LE = loads_LE / loads_LE.sum(-1, keepdim=True)
    return float(shares_LE.max()) * loads_LE.shape[-1]
