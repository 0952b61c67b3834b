"""Supervised losses: one value per trained token (N tokens)."""

from __future__ import annotations

from torch import Tensor


def nll(logprobs_N: Tensor) -> Tensor:
    """Negative log-likelihood, -log p(y_t | y_<t). Returns [N]; its mean over tokens is the cross-entropy."""
    return -logprobs_N
