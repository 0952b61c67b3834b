"""The objective of judged completions (KTO, BCO and kin), and what its steps need to know. The unit is a completion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stages.data.unpaired import TokenizedCompletion
from stages.losses.host_numbers import beside, on_device
from stages.losses.logprobs import TokenScores
from stages.losses.unpaired import JudgedLogprobs
from stages.training.batch import Branch, Group, TokenBatch
from stages.training.loop import Trainer
from stages.training.metrics import Mean
from stages.training.model import token_logprobs
from stages.training.objective import Forward, Windows
from stages.training.scored_windows import ScoredWindows


@dataclass(frozen=True)
class Judged:
    """What is known of a completion."""

    desirable: bool
    reference: float
    """Its summed log-probability under the reference."""
    mismatched: Sequence[int] = ()
    """A completion of another prompt, behind this one's: what the KL term is estimated on."""
    mismatched_reference: float = 0.0
    density: float = 1.0
    """Density ratio of its prompt, desirable over undesirable."""
    kl: float = 0.0
    """Of the step."""
    shift: float = 0.0
    """Of the step."""


class UnpairedLoss:
    """A loss of judged completions; the groups hold one completion and carry `Judged`."""

    def __init__(self, loss: Callable[[JudgedLogprobs], Tensor], beta: float, measured: Sequence[str]) -> None:
        """`measured`: which of `kl` and `delta` the loss reads."""
        self.loss, self.beta, self.measured = loss, beta, measured
        self.metric_names: Sequence[str] = (
            "rewards/chosen",
            "rewards/rejected",
            "logps/chosen",
            "logps/rejected",
            "entropy",
            *measured,
        )

    def count(self, group: Group) -> float:
        """One completion."""
        return 1

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(sum of the completions' losses, TRL's KTO metrics; chosen: the desirable ones)."""
        scores: TokenScores = forward(batch, token_logprobs(batch, with_entropy=True))
        known: list[Judged] = [group.data for group in batch.groups]
        sums_B = batch.sum_by_branch(scores.logprobs_N)
        judged = JudgedLogprobs(
            policy_B=sums_B,
            reference_B=beside([one.reference for one in known], sums_B),
            desirable_B=on_device([one.desirable for one in known], sums_B.device),
            kl_B=beside([one.kl for one in known], sums_B),
            shift_B=beside([one.shift for one in known], sums_B),
            density_B=beside([one.density for one in known], sums_B),
        )
        return self.loss(judged).sum(), self._metrics(judged, known, scores)

    def concluded(self, means: Mapping[str, float]) -> dict[str, float]:
        """`rewards/margins`, as TRL has it: the difference of both kinds' means, in steps that have both."""
        kinds = "rewards/chosen", "rewards/rejected"
        return {"rewards/margins": means[kinds[0]] - means[kinds[1]]} if means.keys() >= set(kinds) else {}

    @torch.no_grad()
    def _metrics(self, judged: JudgedLogprobs, known: Sequence[Judged], scores: TokenScores) -> dict[str, Mean]:
        good = sum(one.desirable for one in known)
        rewards_B, chosen_B = self.beta * judged.log_ratios(), judged.desirable_B
        assert scores.entropy_N is not None
        step = {"kl": sum(one.kl for one in known), "delta": sum(one.shift for one in known)}
        return {
            "rewards/chosen": Mean((rewards_B * chosen_B).sum(), good),
            "rewards/rejected": Mean((rewards_B * ~chosen_B).sum(), len(known) - good),
            "logps/chosen": Mean((judged.policy_B * chosen_B).sum(), good),
            "logps/rejected": Mean((judged.policy_B * ~chosen_B).sum(), len(known) - good),
            "entropy": Mean(scores.entropy_N.sum(), len(scores.entropy_N)),
            **{name: Mean(step[name], len(known)) for name in self.measured},
        }


def judged_groups(rows: Sequence[TokenizedCompletion], others: Sequence[list[int]] | None) -> list[Group]:
    """Every completion with its `Judged`, of which the reference is still to come; `others`: mismatched completions."""
    tails = [()] * len(rows) if others is None else others
    return [
        Group(row.row_id, row.prompt_ids, (Branch(row.completion_ids),), Judged(row.label, 0.0, mismatched=tail))
        for row, tail in zip(rows, tails, strict=True)
    ]


def scored_groups(groups: Sequence[Group]) -> list[Group]:
    """What the reference scores of `judged_groups`: the completion and, where there is one, the mismatched one after
    the same prompt."""
    found = []
    for group in groups:
        other = (Branch(group.data.mismatched),) if group.data.mismatched else ()
        found.append(Group(group.row_id, group.prefix_ids, (*group.branches, *other)))
    return found


def referenced(groups: Sequence[Group], scored: Sequence[Mapping[str, Any]]) -> list[Group]:
    """The groups with their references; `scored`: rows of `score_rows` for `scored_groups`."""
    found = []
    for group, row in zip(groups, scored, strict=True):
        reference, *other = row["sums"]
        judged = replace(group.data, reference=reference, mismatched_reference=other[0] if other else 0.0)
        found.append(replace(group, data=judged))
    return found


def whole_sum(branches: Sequence[list[float]]) -> list[float]:
    """The summed log-probability of every branch."""
    return [sum(values) for values in branches]


class KLWindows(ScoredWindows):
    """Completions with KTO's KL term: the mean log-ratio of the step's mismatched completions, at least 0."""

    def present(self, groups: Sequence[Group]) -> list[Judged]:
        """One pass without gradients over their mismatched completions."""
        known: list[Judged] = [group.data for group in groups]
        others = [replace(group, branches=(Branch(group.data.mismatched),)) for group in groups]
        sums_B1 = self.measured(self.trainer.policy(), others, whole_sum)
        references_B = torch.tensor([one.mismatched_reference for one in known], dtype=torch.float64)
        kl = max(0.0, float((sums_B1[:, 0] - references_B).mean()))
        return [replace(one, kl=kl) for one in known]


class ShiftWindows(ScoredWindows):
    """Completions with BCO's reward shift: the mean of all rewards up to and with this step's."""

    def __init__(self, windows: Windows, trainer: Trainer, beta: float) -> None:
        super().__init__(windows, trainer)
        self.beta = beta
        self.count, self.mean = 0, 0.0

    def before(self, step: int, groups: Sequence[Group]) -> None:
        """One pass without gradients over the completions of the step."""
        sums_B1 = self.measured(self.trainer.policy(), groups, whole_sum)
        references_B = torch.tensor([group.data.reference for group in groups], dtype=torch.float64)
        rewards_B = self.beta * (sums_B1[:, 0] - references_B)
        self.count += len(groups)
        self.mean += (float(rewards_B.sum()) - len(groups) * self.mean) / self.count

    def present(self, groups: Sequence[Group]) -> list[Judged]:
        """The mean as it is."""
        return [replace(group.data, shift=self.mean) for group in groups]

    def state(self) -> dict[str, Any]:
        """The running mean too."""
        return {**super().state(), "rewards": [self.count, self.mean]}

    def load(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take up the running mean."""
        super().load(state, tensors)
        self.count, self.mean = state.get("rewards", (0, 0.0))
