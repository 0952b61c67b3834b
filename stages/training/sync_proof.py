"""Proof that an engine has the trainer's weights and computes as it does: both find tokens equally likely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from artifacts.errors import StageError
from stages.rollouts.engine import Engine
from stages.rollouts.requests import Completion, SampleRequest, SamplingConfig
from stages.training.batch import Branch, Group
from stages.training.model import Scorer
from stages.training.out_of_memory import TokenBudget
from stages.training.reference import branch_logprobs

PROOF_TOKENS = 4096
"""Of fresh rollouts that are computed again, at least one prompt's."""
_OTHER_WEIGHTS = 0.05
"""Mean difference, in nats a token, that rounding does not explain."""


@dataclass(frozen=True)
class Differing:
    """The token that differs most."""

    row: str
    place: int
    token: int
    engine: float
    trainer: float
    mean: float
    """Of all differences."""

    @property
    def difference(self) -> float:
        """In nats; infinite where one of both is no number."""
        found = abs(self.engine - self.trainer)
        return found if math.isfinite(found) else math.inf


class SyncProof:
    """Compares fresh rollouts, and raises StageError where they differ. Another one each time it is called."""

    def __init__(self, engine: Engine, budget: TokenBudget, *, tolerance: float, dtypes: tuple[str, str]) -> None:
        """`dtypes`: the engine's and the trainer's."""
        self._engine, self._budget, self._tolerance, self._dtypes = engine, budget, tolerance, dtypes
        self.passed = 0
        """How often it held."""

    def __call__(
        self,
        scorer: Scorer,
        requests: Sequence[SampleRequest],
        sampled: Sequence[Sequence[Completion]],
        settings: SamplingConfig,
        *,
        fresh: bool = True,
    ) -> None:
        """`sampled` are completions of the requests: `fresh` ones are the engine's under the weights that `scorer` has,
        and others are compared by what both make of them under these weights."""
        groups, plain = _some(requests, sampled), settings.restricts() or not fresh
        if not groups:
            if plain:  # others that share the engine may have some, and all call it equally often
                self._engine.plain_logprobs([])
            return
        worst = self._worst(scorer, groups, settings, plain=plain)
        if not worst.difference <= self._tolerance:
            raise StageError(self._message(worst, scorer))
        self.passed += 1

    def _worst(
        self,
        scorer: Scorer,
        groups: Sequence[tuple[Group, Sequence[Completion]]],
        settings: SamplingConfig,
        *,
        plain: bool,
    ) -> Differing:
        # what was drawn from a cut distribution, or the likeliest token, compares under the model's own
        temperature = 1.0 if plain or settings.temperature == 0 else settings.temperature
        computed = branch_logprobs(scorer, [group for group, _ in groups], self._budget, temperature=temperature)
        ours = [values for branches in computed for values, _ in branches]
        if plain:
            theirs = self._engine.plain_logprobs(
                [(group.prefix_ids, branch.token_ids) for group, _ in groups for branch in group.branches]
            )
        else:
            theirs = [completion.logprobs for _, completions in groups for completion in completions]
        places = [
            (group.row_id, place, token)
            for group, _ in groups
            for branch in group.branches
            for place, token in enumerate(branch.token_ids)
        ]
        pairs = [pair for two in zip(theirs, ours, strict=True) for pair in zip(*two, strict=True)]
        differences = [abs(engine - trainer) for engine, trainer in pairs]
        index = max(range(len(pairs)), key=lambda i: differences[i] if math.isfinite(differences[i]) else math.inf)
        return Differing(*places[index], *pairs[index], mean=sum(differences) / len(differences))

    def _message(self, worst: Differing, scorer: Scorer) -> str:
        return (
            f"rollouts.engine gave token {worst.token}, number {worst.place + 1} of a completion of row {worst.row}, "
            f"log-probability {worst.engine:.4f}, the trainer {worst.trainer:.4f}; they may differ by "
            f"{self._tolerance:g}, and do by {worst.mean:.2g} on average. {self._cause(worst, scorer)}"
        )

    def _cause(self, worst: Differing, scorer: Scorer) -> str:
        engine, trainer = self._dtypes
        if not math.isfinite(worst.engine) or not math.isfinite(worst.trainer):
            whose = "the engine's" if math.isfinite(worst.trainer) else "the trainer's"
            return f"A number of {whose} is not finite: look at its weights"
        if worst.mean > _OTHER_WEIGHTS:
            head = ""
            if getattr(scorer.transformers_model.config, "tie_word_embeddings", False):
                head = "; this model ties its head to the embedding: the engine may have kept the old head"
            since = f"it held {self.passed} times before" if self.passed else "it never held before"
            return f"So much is other weights: the sync did not reach the engine, or not all of it ({since}){head}"
        return (
            f"So little is likely rounding: the engine computes in {engine}, the trainer in {trainer}; give "
            "rollouts.dtype, or a larger rollouts.sync_tolerance"
        )


def _some(
    requests: Sequence[SampleRequest], sampled: Sequence[Sequence[Completion]]
) -> list[tuple[Group, Sequence[Completion]]]:
    """The first prompts with completions, of PROOF_TOKENS together, or one alone."""
    found: list[tuple[Group, Sequence[Completion]]] = []
    tokens = 0
    for number, (request, completions) in enumerate(zip(requests, sampled, strict=True)):
        spoken = [completion for completion in completions if completion.token_ids]
        name = f"number {number}" if request.row_id is None else request.row_id
        group = Group(name, list(request.prompt_ids), tuple(Branch(one.token_ids) for one in spoken))
        if not spoken or (found and tokens + group.length > PROOF_TOKENS):
            continue
        found.append((group, spoken))
        tokens += group.length
    return found
