"""Tokens of two completions, interleaved, whose losses can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stages.losses.policy_tokens import LOG_RATIOS, PolicyTokens, Sequences

SEQUENCE = [0, 1, 0, 1, 1]
RATIOS = [1.5, 0.5, 0.5, 1.0, 1.5]
"""Products: 0.75 in both sequences."""
ADVANTAGES = [2.0, -2.0, 2.0, -2.0, -2.0]
LOGPROBS = [-1.0, -2.0, -1.0, -2.0, -2.0]


def tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tokens_of(logprobs_N: Tensor, level: str, *, old_N: Tensor | None = None, **known: Tensor) -> PolicyTokens:
    """As they are at these log-probabilities; without old ones, with the ratios above at LOGPROBS."""
    old_N = tensor(LOGPROBS) - tensor(RATIOS).log() if old_N is None else old_N
    changes_N = logprobs_N - old_N
    sequences = Sequences(torch.tensor(SEQUENCE), 2)
    log_ratios_N = LOG_RATIOS[level](changes_N, sequences)
    return PolicyTokens(log_ratios_N, changes_N, logprobs_N, tensor(ADVANTAGES), sequences, **known)


def frozen_ratios(tokens: PolicyTokens) -> PolicyTokens:
    """Ratios are numbers, log-probabilities have a gradient."""
    return replace(tokens, log_ratios_N=tokens.log_ratios_N.detach(), changes_N=tokens.changes_N.detach())


def part_of(tokens: PolicyTokens, sequence: int) -> PolicyTokens:
    """One of the sequences alone."""
    here_N = tokens.sequences.of_N == sequence
    cut = {name: value[here_N] for name, value in vars(tokens).items() if isinstance(value, Tensor)}
    count = int(here_N.sum())
    return replace(tokens, **cut, sequences=Sequences(torch.zeros(count, dtype=torch.long), 1))
