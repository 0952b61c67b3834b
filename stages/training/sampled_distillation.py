"""The objective of distillation by policy gradients, on tokens that the student sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from artifacts.errors import StageError
from stages.losses.distillation import divergence_of
from stages.losses.divergence_beside import linear_divergence_beside
from stages.losses.head import Head
from stages.losses.host_numbers import on_device
from stages.losses.linear_divergence import linear_divergence
from stages.losses.logprobs import linear_logprobs
from stages.losses.policy_correction import Correction
from stages.losses.policy_tokens import Sequences
from stages.losses.sampled_distillation import SampledLoss, SampledTokens
from stages.losses.token_loss import linear_token_loss
from stages.training.batch import Branch, Group, TokenBatch
from stages.training.distillation import WholeTeacher
from stages.training.language_modeling import asked_tokens
from stages.training.metrics import Extreme, Mean
from stages.training.model import Scorer
from stages.training.objective import Forward, Readout
from stages.training.policy_known import group_of_branch
from stages.training.worst_difference import LARGEST, WorstDifference


@dataclass(frozen=True)
class SampledBranch(Branch):
    """A completion as it was sampled."""

    logprobs: Sequence[float] = ()
    """Of each token, under the distribution that it was drawn from."""


@dataclass(frozen=True)
class Told:
    """What a teacher says of a batch's asked-for tokens, in their order."""

    logprobs_N: Tensor
    whole: tuple[Tensor, Head] | None = None
    """What all tokens' log-probabilities follow from: hidden states [N, H] and the head."""


Telling = Callable[[TokenBatch], Told]


def telling(teacher: WholeTeacher, *, whole: bool) -> Telling:
    """By a teacher in this process. `whole`: it is asked for all tokens too."""

    @torch.no_grad()
    def tell(batch: TokenBatch) -> Told:
        hidden_NH, head = teacher.hidden(batch), teacher.head()
        scores = linear_logprobs(hidden_NH, head, batch.target_N, with_entropy=False)
        return Told(scores.logprobs_N, (hidden_NH, head) if whole else None)

    return tell


@dataclass(frozen=True)
class SampledSettings:
    """How what a teacher says becomes a loss."""

    loss: SampledLoss
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Of the loss."""
    temperature: float = 1.0
    """Divides the student's logits; the teacher has it already."""
    decomposes: bool = False
    """The exact reverse KL divergence at every token is added."""
    correction: Correction | None = None
    """For a sampler that is not quite the student."""
    tolerance: float | None = None
    """Largest difference between sampler and student, in nats a token; None: they need not agree."""


class SampledDistillationLoss:
    """Sum over asked-for tokens of -A log S(y), A the credits of a loss of SAMPLED_LOSSES, with the exact divergence at
    each of them where the loss is decomposed.

    The groups' branches are `SampledBranch`es; a group's data is what the teacher sees in place of the prompt, as in
    `DistillationLoss`. `divergence` is log S - log T of what was sampled: an estimate of the reverse KL divergence, or
    where that is known, itself.
    """

    def __init__(self, tell: Telling, settings: SampledSettings) -> None:
        loss = settings.loss
        self.tell, self.settings = tell, settings
        self.credits = loss.with_settings(settings.parameters)
        self.metrics = loss.metrics_with(settings.parameters)
        self.divergence = divergence_of(1.0)
        self.metric_names: Sequence[str] = (
            "divergence",
            *self.metrics,
            "sampling/sampling_logp_difference/mean",
            "sampling/importance_sampling_ratio/mean",
        )
        bounds = {name: sign for name, (_, sign) in loss.extremes.items()}
        self.extremes: Mapping[str, int] = {**bounds, LARGEST: 1}
        self.worst = WorstDifference(settings.tolerance, "student")

    def count(self, group: Group) -> float:
        """Asked-for tokens."""
        return asked_tokens(group)

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(sum of the tokens' losses, the divergence, the loss's metrics and how far sampler and student differ)."""
        told, sampled_N = self.tell(batch), sampled_logprobs(batch)
        sequences = Sequences(batch.branch_N, batch.num_branches)
        tokens = SampledTokens(told.logprobs_N.double() - sampled_N, sequences)
        known = _Known(self.credits(tokens), sampled_N, sequences)
        loss, logprobs_N, divergences_N = forward(batch, self._readout(batch, known, told))
        # to look would wait for the batch; a loss that is no number is looked into row by row, in evaluation
        loss = loss + torch.where(told.logprobs_N.isfinite().all(), 0.0, torch.nan).to(loss.dtype)
        with torch.no_grad():
            found = {name: metric(tokens) for name, metric in self.metrics.items()}
            found["divergence"] = -tokens.advantages_N if divergences_N is None else divergences_N
            found["sampling/sampling_logp_difference/mean"] = (logprobs_N - sampled_N).abs()
            self.worst.note(batch, sampled_N, logprobs_N)
            if (correction := self.settings.correction) is not None:
                ratios_N = correction(logprobs_N.double(), sampled_N, sequences)
                found["sampling/importance_sampling_ratio/mean"] = correction.measured(ratios_N, sequences)
            return loss, self._summed(found)

    def concluded(self, means: Mapping[str, float]) -> dict[str, float]:
        """Nothing. Raises StageError where sampler and student differ by more than the tolerance."""
        self.worst.require(means)
        return {}

    def _readout(self, batch: TokenBatch, known: _Known, told: Told) -> Readout:
        """Token by token, unless a correction hangs on the other tokens of a completion."""
        correction, exact = self.settings.correction, told.whole if self.settings.decomposes else None
        by_token = correction is None or correction.mode.of_single_tokens

        def token_loss(logprobs_C: Tensor, part: slice) -> Tensor:
            credits_C = known.credits_N[part]
            if correction is not None:
                cut = Sequences(known.sequences.of_N[part], known.sequences.count)
                credits_C = credits_C * correction(logprobs_C.detach().double(), known.sampled_N[part], cut)
            return -credits_C.to(logprobs_C.dtype) * logprobs_C

        def read(hidden_NH: Tensor, student: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
            assert isinstance(student, Scorer)
            if not student.training:
                self._require_possible(batch, told.logprobs_N)
            head, targets_N = student.head(self.settings.temperature), batch.target_N
            if exact is not None and by_token:
                return linear_divergence_beside(hidden_NH, head, targets_N, token_loss, exact, self.divergence)
            if by_token:
                loss, scores = linear_token_loss(hidden_NH, head, targets_N, token_loss, with_entropy=False)
                return loss, scores.logprobs_N, None
            assert correction is not None
            scores = linear_logprobs(hidden_NH, head, targets_N, with_entropy=False)
            loss, logprobs_N = token_loss(scores.logprobs_N, slice(None)).sum(), scores.logprobs_N.detach()
            if exact is None:
                return loss, logprobs_N, None
            ratios_N = correction(logprobs_N.double(), known.sampled_N, known.sequences).to(logprobs_N.dtype)
            apart, divergences_N = self._apart(hidden_NH, head, exact, ratios_N)
            return loss + apart, logprobs_N, divergences_N

        return Readout(batch.source_N, read)

    def _apart(
        self, hidden_NH: Tensor, head: Head, teacher: tuple[Tensor, Head], ratios_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `linear_divergence`, each completion's counted by its ratio: whether the student would have come there."""
        teacher_NH, taught = teacher
        common = min(head.vocabulary, taught.vocabulary)
        heads = head.first(common), taught.first(common)
        return linear_divergence(hidden_NH, heads[0], teacher_NH, heads[1], self.divergence, weights_N=ratios_N)

    def _require_possible(self, batch: TokenBatch, logprobs_N: Tensor) -> None:
        """Raises StageError for a token whose log-probability under the teacher is none: the divergence is infinite,
        and any number in its place would be made up."""
        if (impossible_N := ~logprobs_N.isfinite()).any():
            at = int(impossible_N.nonzero()[0])
            raise StageError(
                f"the teacher gives token {int(batch.target_N[at])} of a completion of row {_row_of(batch, at)} "
                f"log-probability {float(logprobs_N[at])}, of which loss_type {self.settings.loss.name} makes no "
                "credit: take a teacher whose head rules no token out, or loss_type divergence with beta 0, which asks "
                "nothing of such tokens"
            )

    def _summed(self, found: Mapping[str, Tensor]) -> dict[str, Mean]:
        metrics = {name: Mean(values.sum(), len(values)) for name, values in found.items()}
        bounds = {**self.settings.loss.extremes}
        bounds[LARGEST] = ("sampling/sampling_logp_difference/mean", 1)
        for name, (of, sign) in bounds.items():
            if len(values := found[of]):
                metrics[name] = Extreme(values.max() if sign > 0 else values.min(), 1)
        return metrics


@dataclass(frozen=True)
class _Known:
    """What a batch's losses depend on besides the student's log-probabilities; floats are float64."""

    credits_N: Tensor
    sampled_N: Tensor
    sequences: Sequences


def _row_of(batch: TokenBatch, at: int) -> str:
    """Whose completion an asked-for token is of."""
    return group_of_branch(batch, int(batch.branch_N[at])).row_id


def sampled_logprobs(batch: TokenBatch) -> Tensor:
    """[N] of the asked-for tokens, under what they were drawn from, in float64."""
    values: list[float] = []
    for group in batch.groups:
        for branch in group.branches:
            assert isinstance(branch, SampledBranch), "given completions have no sampler"
            mask = [True] * len(branch.token_ids) if branch.loss_mask is None else branch.loss_mask
            values += [value for value, asked in zip(branch.logprobs, mask, strict=True) if asked]
    return on_device(values, batch.target_N.device, torch.float64)
