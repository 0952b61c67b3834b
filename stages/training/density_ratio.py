"""How much a prompt looks like those of desirable completions: the density ratio that BCO weighs with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from artifacts.errors import DataError
from stages.context import Context
from stages.training.batch import Branch, Group, TokenBatch
from stages.training.model import Scorer
from stages.training.objective import Readout
from stages.training.out_of_memory import TokenBudget
from stages.training.passes import without_gradients


class DensityConfig(Protocol):
    """Settings of the ratio."""

    @property
    def prompt_sample_size(self) -> int:
        """Prompts of each kind to learn from, at most."""

    @property
    def min_density_ratio(self) -> float:
        """Lower bound of the ratios."""

    @property
    def max_density_ratio(self) -> float:
        """Upper bound of the ratios."""

    @property
    def micro_batch_tokens(self) -> int:
        """Most tokens of a forward pass."""


def density_ratios(scorer: Scorer, groups: Sequence[Group], context: Context, config: DensityConfig) -> list[float]:
    """For every group of `judged_groups` p / (1 - p), within the bounds; p: probability that its prompt is a desirable
    completion's.

    A logistic regression, both kinds weighing the same, on the last hidden state of the prompt under `scorer` (Jung et
    al., arXiv:2404.04656, sec. 4.2, where it is a text embedding). Learnt from those of each kind whose rows' ids have
    the smallest digests.
    """
    states_BH = prompt_states(scorer, groups, TokenBudget(context, config.micro_batch_tokens))
    kind_of = [group.data.desirable for group in groups]
    if len(set(kind_of)) < 2:
        raise DataError(
            "use_density_ratio compares the prompts of desirable and undesirable completions; all "
            f"{len(groups)} rows are of one kind"
        )
    order = sorted(range(len(groups)), key=lambda index: hashlib.sha256(groups[index].row_id.encode()).digest())
    kinds = [[index for index in order if kind_of[index] == kind] for kind in (False, True)]
    chosen = [index for kind in kinds for index in kind[: config.prompt_sample_size]]
    labels_B = torch.tensor([float(kind_of[index]) for index in chosen], dtype=torch.float64)
    mean_H, deviation_H = states_BH[chosen].mean(0), states_BH[chosen].std(0, unbiased=False).clamp(min=1e-6)
    features_BH = (states_BH - mean_H) / deviation_H
    weight_H, bias = logistic_regression(features_BH[chosen], labels_B)
    ratios_B = (features_BH @ weight_H + bias).exp()  # p / (1 - p) of a logistic regression is e^logit
    clamped: list[float] = ratios_B.clamp(config.min_density_ratio, config.max_density_ratio).tolist()
    return clamped


def with_densities(scorer: Scorer, groups: Sequence[Group], context: Context, config: DensityConfig) -> list[Group]:
    """The groups with their density ratios."""
    ratios = density_ratios(scorer, groups, context, config)
    return [replace(group, data=replace(group.data, density=one)) for group, one in zip(groups, ratios, strict=True)]


def prompt_states(scorer: Scorer, groups: Sequence[Group], budget: TokenBudget) -> Tensor:
    """[B, H] float64: the last hidden state of every prompt."""
    prompts = [
        Group(group.row_id, (), (Branch(group.prefix_ids, [False] * len(group.prefix_ids)),)) for group in groups
    ]
    states: list[Tensor] = [torch.empty(0)] * len(prompts)

    def compute(indices: list[int], batch: TokenBatch) -> None:
        found_KH = scorer(batch, Readout(batch.last_K, lambda hidden_KH, _: hidden_KH.double().cpu()))
        for place, index in enumerate(indices):
            states[index] = found_KH[place]

    scorer.eval()
    without_gradients(scorer, prompts, budget, compute)
    return torch.stack(states)


def logistic_regression(features_BH: Tensor, labels_B: Tensor, penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    """(weight [H], bias): least balanced cross-entropy, summed, plus penalty |weight|^2 / 2; by L-BFGS, in float64."""
    weight_H = torch.zeros(features_BH.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    counts = [max(1.0, float((labels_B == kind).sum())) for kind in (0, 1)]
    balance_B = torch.where(labels_B == 1, len(labels_B) / (2 * counts[1]), len(labels_B) / (2 * counts[0]))
    solver = torch.optim.LBFGS(
        [weight_H, bias], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        solver.zero_grad()
        logits_B = features_BH @ weight_H + bias
        fit = binary_cross_entropy_with_logits(logits_B, labels_B, weight=balance_B, reduction="sum")
        loss = fit + penalty / 2 * weight_H.square().sum()
        torch.autograd.backward([loss])
        return float(loss.detach())

    solver.step(closure)
    return weight_H.detach(), bias.detach()
