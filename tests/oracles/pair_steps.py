"""Rows of pairs for TRL's trainers, and a step of ours over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from stages.losses.pair_logprobs import PairLogprobs
from stages.losses.preference import PREFERENCE_LOSSES, weighted
from stages.seeds import generator
from stages.training.batch import Branch, Group
from stages.training.model import Scorer
from stages.training.pairs import NO_REFERENCE
from stages.training.preference import PairSettings, PreferenceLoss
from stages.training.reference import pair_references
from tests.oracles.steps import Step, gradient_norm
from tests.training.conftest import VOCABULARY, packing_scorer
from tests.training.test_objectives import plain_logprobs

BETA, PAIRS = 0.3, 6


def rows(completions: int, *, equal: bool = False) -> list[Group]:
    """Prompts with that many completions; with `equal`, all completions of a rank have one length."""
    draws = generator(5, "oracle", completions)

    def ids(length: int) -> list[int]:
        drawn: list[int] = draws.integers(3, VOCABULARY, length).tolist()
        return drawn

    groups = []
    for number in range(PAIRS):
        prompt = ids(int(draws.integers(2, 9)))
        lengths = [4, 7, 5] if equal else draws.integers(2, 10, completions).tolist()
        tails = tuple(Branch(ids(length)) for length in lengths[:completions])
        groups.append(Group(f"row{number}", prompt, tails))
    return groups


def examples(groups: Sequence[Group]) -> list[dict[str, Any]]:
    names = ("chosen_ids", "rejected_ids", "reference_ids")
    return [
        {"prompt_ids": list(group.prefix_ids)}
        | {name: list(branch.token_ids) for name, branch in zip(names, group.branches, strict=False)}
        for group in groups
    ]


def our_step(
    model: torch.nn.Module,
    reference: torch.nn.Module | None,
    groups: Sequence[Group],
    names: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    settings: Mapping[str, float] | None = None,
    **variant: Any,
) -> Step:
    """The step on packed rows with shared prompts."""
    first = PREFERENCE_LOSSES[names[0]]
    reward = first.reward_with(settings or {}) or PairLogprobs.log_ratios
    pair = PairSettings(BETA, reward=reward, metrics=first.metrics, **variant)
    if reference is not None:
        groups = with_references(reference, groups, pair.ld_alpha)
    else:
        groups = [replace(group, data=NO_REFERENCE) for group in groups]
    scorer = packing_scorer(model)
    loss = weighted(names, weights or [1.0] * len(names), {"beta": BETA, **(settings or {})})
    total, metrics = PreferenceLoss(loss, pair)(scorer, scorer.layout(list(groups)))
    norm = gradient_norm(model, total / len(groups))
    return Step(
        float(total.detach()) / len(groups),
        norm,
        {name: float(one.sum) / float(one.count) for name, one in metrics.items()},
    )


def with_references(reference: torch.nn.Module, groups: Sequence[Group], ld_alpha: float | None) -> list[Group]:
    with torch.no_grad():
        tokens = [row.tolist() for row in plain_logprobs(Scorer(reference), list(groups))]
    pairs = zip(tokens[0::2], tokens[1::2], strict=True)
    scored = [{"sums": [sum(one) for one in pair], "logprobs": list(pair)} for pair in pairs]
    return [replace(group, data=one) for group, one in zip(groups, pair_references(scored, ld_alpha), strict=True)]
