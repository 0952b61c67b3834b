"""The completions of a generation as tables of S sequences by T tokens, zeros beyond their lengths; float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.losses.policy_correction import Correction
from stages.losses.policy_kl import KL_ESTIMATORS
from stages.losses.policy_tokens import Sequences
from stages.training.batch import Group
from stages.training.policy_known import Rollouts

Ragged = Sequence[Sequence[Sequence[float]]]
"""By group, by branch, by token."""


@dataclass(frozen=True)
class ValuedRollouts(Rollouts):
    """`advantages` holds every completion's score until it is measured, then the mean of its tokens' advantages."""

    values: tuple[list[float], ...] = ()
    token_advantages: tuple[list[float], ...] = ()
    returns: tuple[list[float], ...] = ()


@dataclass(frozen=True)
class TokenTable:
    """Groups whose data are Rollouts with a score in place of the advantage, and what was measured of their tokens."""

    groups: Sequence[Group]
    scores_S: Tensor
    lengths_S: Tensor
    inside_ST: Tensor
    sampled_ST: Tensor
    old_ST: Tensor
    values_ST: Tensor
    reference_ST: Tensor | None

    @classmethod
    def of(cls, groups: Sequence[Group], old: Ragged, values: Ragged, reference: Ragged | None) -> TokenTable:
        """`old`, `values`, `reference`: log-probabilities and values, by group, branch and token."""
        lengths_S = torch.tensor([len(branch) for branches in old for branch in branches])
        longest = int(lengths_S.max())
        return cls(
            groups,
            scores_S=torch.tensor([score for group in groups for score in group.data.advantages], dtype=torch.float64),
            lengths_S=lengths_S,
            inside_ST=torch.arange(longest) < lengths_S[:, None],
            sampled_ST=_padded([group.data.sampled_logprobs for group in groups], longest),
            old_ST=_padded(old, longest),
            values_ST=_padded(values, longest),
            reference_ST=None if reference is None else _padded(reference, longest),
        )

    def compare(self, tolerance: float | None) -> float:
        """Mean difference of sampler and trainer, in nats a token.

        Raises StageError where one is beyond the tolerance: stale weights, or different numerics.
        """
        differences_ST = (self.sampled_ST - self.old_ST).abs()
        if tolerance is not None and float(differences_ST.max()) > tolerance:
            sequence, place = divmod(int(differences_ST.argmax()), differences_ST.shape[1])
            rows = [group.row_id for group in self.groups for _ in group.branches]
            theirs, ours = float(self.sampled_ST[sequence, place]), float(self.old_ST[sequence, place])
            raise StageError(
                f"the sampler gave token {place + 1} of a completion of row {rows[sequence]} log-probability "
                f"{theirs:.4f}, the trainer {ours:.4f}: the sampler has other weights, or computes differently"
            )
        return float(differences_ST.sum() / self.lengths_S.sum())

    def divergences(self, estimator: str) -> Tensor:
        """[S, T] estimates of KL(policy || reference); zeros where there is no reference."""
        if self.reference_ST is None:
            return torch.zeros_like(self.old_ST)
        return KL_ESTIMATORS[estimator](self.old_ST, self.reference_ST)

    def on_tokens(self, function: Callable[[Tensor], Tensor], values_ST: Tensor) -> Tensor:
        """`function` of the values of all tokens as one vector, put back; of a single token as it is."""
        values_N = values_ST[self.inside_ST]
        if len(values_N) < 2:  # which has no variance
            return values_ST
        return torch.zeros_like(values_ST).masked_scatter(self.inside_ST, function(values_N))

    def corrections(self, correction: Correction) -> tuple[Tensor, Tensor]:
        """([S, T] importance of the policy at sampling time to the sampler, zeros beyond the lengths; [N], or [S] of
        the modes of sequences: what metrics are of)."""
        of_N = torch.arange(len(self.lengths_S)).repeat_interleave(self.lengths_S)
        sequences = Sequences(of_N, len(self.lengths_S))
        ratios_N = correction(self.old_ST[self.inside_ST], self.sampled_ST[self.inside_ST], sequences)
        ratios_ST = torch.zeros_like(self.old_ST).masked_scatter(self.inside_ST, ratios_N)
        return ratios_ST, correction.measured(ratios_N, sequences)

    def metrics(self, kl_ST: Tensor, kl_coef: float) -> dict[str, float]:
        """TRL's `objective/...`: means over completions of sums over tokens."""
        kl, score = float(kl_ST.sum(1).mean()), float(self.scores_S.mean())
        found = {
            "objective/scores": score,
            "objective/entropy": float(-self.old_ST.sum(1).mean()),
            "objective/non_score_reward": -kl_coef * kl,
            "objective/rlhf_reward": score - kl_coef * kl,
        }
        if self.reference_ST is None:
            return found
        per_token = float(kl_ST.sum() / self.lengths_S.sum())
        return {"objective/kl": kl, "objective/kl_coef": kl_coef, "kl": per_token, **found}

    def groups_with(self, advantages_ST: Tensor, returns_ST: Tensor) -> list[Group]:
        """The groups with all that their tokens' losses need."""
        tables = (self.old_ST, self.values_ST, advantages_ST, returns_ST)
        rows = [
            [row_T[:length].tolist() for row_T in rows]
            for *rows, length in zip(*tables, self.lengths_S.tolist(), strict=True)
        ]
        return [self._group(group, [rows.pop(0) for _ in group.branches]) for group in self.groups]

    @staticmethod
    def _group(group: Group, rows: Sequence[Sequence[list[float]]]) -> Group:
        old, values, advantages, returns = (tuple(column) for column in zip(*rows, strict=True))
        data = ValuedRollouts(
            advantages=tuple(sum(one) / max(1, len(one)) for one in advantages),
            sampled_logprobs=group.data.sampled_logprobs,
            old_logprobs=old,
            values=values,
            token_advantages=advantages,
            returns=returns,
        )
        return Group(group.row_id, group.prefix_ids, group.branches, data)


def _padded(ragged: Ragged, longest: int) -> Tensor:
    rows = [[*branch, *[0.0] * (longest - len(branch))] for branches in ragged for branch in branches]
    return torch.tensor(rows, dtype=torch.float64)
