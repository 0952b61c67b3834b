"""Supervised losses: one value per trained token (N tokens).

Nothing here imports torch before a loss is computed: recipes are checked against the table of losses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.losses.registry import Losses

if TYPE_CHECKING:
    from torch import Tensor

SUPERVISED_LOSSES = Losses()
"""`loss_type` -> Loss."""


@SUPERVISED_LOSSES.add("SFT", "cross-entropy", reference=False)
def nll(logprobs_N: Tensor) -> Tensor:
    """Negative log-likelihood, -log p(y_t | y_<t). Returns [N]; its mean over tokens is the cross-entropy."""
    return -logprobs_N


@SUPERVISED_LOSSES.add("DFT (dynamic fine-tuning)", "2508.05629", reference=False)
def dft(logprobs_N: Tensor) -> Tensor:
    """-sg(p) log p, p the token's own probability, without a gradient in sg. Returns [N].

    Wu et al., arXiv:2508.05629, eq. 9: undoes the weight 1/p that the likelihood's gradient gives to a token.
    """
    return -logprobs_N.detach().exp() * logprobs_N
