"""What `accuracy` says besides: the mean of every reward, and of several answers to a prompt whether any is right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import comb
from typing import Any

from stages.evaluation.intervals import Estimate, mean_estimate, ratio_estimate

Rows = Sequence[Sequence[dict[str, Any]]]
"""The records of every row's answers."""


def reward_means(rows: Rows, names: Sequence[str], seed: int) -> dict[str, Estimate]:
    """`rewards/NAME/mean` over all answers that the function scored, and `rewards/mean` of their weighted sum where
    there are several functions."""
    fields = {f"rewards/{name}/mean": f"reward_{name}" for name in names}
    if len(names) > 1:
        fields["rewards/mean"] = "reward"
    found = {}
    for metric, field in fields.items():
        values = [[float(one[field]) for one in row if one.get(field) is not None] for row in rows]
        if any(values):
            found[metric] = ratio_estimate([sum(row) for row in values], [float(len(row)) for row in values], seed)
    return found


def pass_rates(rows: Rows, seed: int) -> dict[str, Estimate]:
    """`accuracy/pass@k` for k = 2, 4, 8, ... and as many answers as were asked for: the share of prompts of which one
    of k answers is right.

    Of n answers, c of them right, the chance that k drawn without replacement hold a right one: 1 - C(n-c, k) / C(n, k)
    (Chen et al., arXiv:2107.03374, equation 1). A prompt of which fewer than k answers were scored does not count.
    """
    scored = [[bool(one["correct"]) for one in row if one["correct"] is not None] for row in rows]
    found = {}
    for k in _sizes(max(map(len, rows), default=0)):
        rates = [1 - comb(len(row) - sum(row), k) / comb(len(row), k) for row in scored if len(row) >= k]
        if rates:
            found[f"accuracy/pass@{k}"] = mean_estimate(rates, seed)
    return found


def _sizes(most: int) -> Iterator[int]:
    size = 2
    while size < most:
        yield size
        size *= 2
    if most > 1:
        yield most
