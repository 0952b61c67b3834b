"""An engine with the weights of an earlier step: they are held while the trainer goes on to others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.rollouts.engine import Engine
from stages.rollouts.requests import Completion, Progress, SampleRequest, SamplingConfig
from stages.training.engine_sync import stamped
from stages.training.model import Scorer
from stages.training.rollout_records import Sampled
from stages.training.sync_proof import SyncProof


@dataclass(frozen=True)
class Held:
    """The trainer's weights as they were."""

    version: int
    """Optimizer steps behind them."""
    weights: tuple[tuple[str, Tensor], ...]
    """Copies in host memory, by their names in a checkpoint."""


class LaggingEngine:
    """A Sampler of the weights that it was last given, whatever the trainer has by then. One thread samples."""

    def __init__(
        self,
        engine: Engine,
        proof: SyncProof,
        weights_of: Callable[[Scorer], Iterable[tuple[str, Tensor]]],
        *,
        policy: Callable[[], Scorer],
        version: Callable[[], int],
        interval: int,
    ) -> None:
        """`weights_of`: what the engine is given of a scorer. `version`: optimizer steps behind the weights of
        `policy`. The proof is due at every `interval`-th time that weights are held, the first one included."""
        self._engine, self._proof, self._weights_of = engine, proof, weights_of
        self._policy, self._version, self._interval = policy, version, interval
        self._given: list[int] = []
        """Versions of all weights that the engine got, or is getting."""
        self._proves_next = False
        self._held = 0

    def hold(self) -> tuple[Held, bool]:
        """(a copy of the present weights, whether a proof is due with them); in the trainer's thread."""
        weights = tuple((name, _on_host(weight)) for name, weight in self._weights_of(self._policy()))
        return Held(self._version(), weights), self._is_due()

    def _is_due(self) -> bool:
        is_due = self._held % self._interval == 0
        self._held += 1
        return is_due

    def renew(self) -> None:
        """Nothing: what is being sampled keeps the weights that it began with."""

    def take(self, held: Held, *, prove: bool = False) -> None:
        """Sample with these from now on. `prove`: what is sampled next, while the trainer has the same weights."""
        self._give(held.version, held.weights)
        self._proves_next = prove

    def prove(self, groups: Sequence[Sampled], settings: SamplingConfig) -> None:
        """That engine and trainer, which has the engine's weights, find tokens of any origin equally likely. Raises
        StageError."""
        requests = [SampleRequest(one.prompt.prompt_ids, (), one.prompt.row_id) for one in groups]
        self._proof(self._policy(), requests, [one.completions for one in groups], settings, fresh=False)

    def sample(
        self, requests: Sequence[SampleRequest], settings: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """Of the weights that were taken; their version is with every token. Raises StageError where a proof fails."""
        assert self._given, "weights are taken before anything is sampled"
        sampled = self._engine.sample(requests, settings, on_progress)
        if self._proves_next:
            self._proof(self._policy(), requests, sampled, settings)
            self._proves_next = False
        return [[self._stamped(completion) for completion in group] for group in sampled]

    def _give(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self._given[-1:] != [version]:
            self._given.append(version)  # first: amid completions one may end before all servers have them
            self._engine.load(weights)

    def _stamped(self, completion: Completion) -> Completion:
        return stamped(completion, self._given[-1])


@torch.no_grad()
def _on_host(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", copy=True)
