"""Runs whose sampler or teacher works while the trainer trains: whose weights are whose, and who waits for whom."""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from stages.training.loop import Trainer
from tests.rollouts.model_server import ModelServer
from tests.waiting import LIMIT_SECONDS

Weights = dict[str, torch.Tensor]


def copied(model: Any) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def name_of(weights: Weights) -> str:
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


def before_steps(monkeypatch: pytest.MonkeyPatch, then: Callable[[int, Trainer], None]) -> None:
    """Have it called with the number of a step before every one."""
    step = Trainer.step

    def noted(self: Trainer, number: int, *rest: Any) -> Any:
        then(number, self)
        return step(self, number, *rest)

    monkeypatch.setattr(Trainer, "step", noted)


class SlowOnes:
    """A server that answers for a step only when the step before has begun, or a trainer that begins a step only when
    all is answered for the next one: neither could go on if the other waited for it.

    `ends`: how many questions are asked in all until a step has what it needs; `counts`: whether one is of a step.
    """

    def __init__(
        self,
        model: ModelServer,
        ends: Sequence[int],
        monkeypatch: pytest.MonkeyPatch,
        counts: Callable[[dict[str, Any]], bool] = lambda body: True,
    ) -> None:
        self._one, self._ends, self._counts = model._one, ends, counts
        self._changed, self._server_is_slow = threading.Condition(), False
        self.asked = self.answered = self._begun = 0
        monkeypatch.setattr(model, "_one", self._answer)
        before_steps(monkeypatch, self._step)

    def begin(self, *, server_is_slow: bool) -> None:
        """A run, in which the server is slow, or else the trainer."""
        self._server_is_slow = server_is_slow
        self.asked = self.answered = self._begun = 0

    def _answer(self, body: dict[str, Any], seed: int) -> dict[str, Any]:
        if not self._counts(body):
            return self._one(body, seed)
        with self._changed:
            step, self.asked = bisect_right(self._ends, self.asked), self.asked + 1
            # step g is over when step g + 1 is asked for, which needs these answers: so the step has begun at least
            assert self._changed.wait_for(lambda: not self._server_is_slow or self._begun >= step, LIMIT_SECONDS)
        made = self._one(body, seed)
        with self._changed:
            self.answered += 1
            self._changed.notify_all()
        return made

    def _step(self, number: int, _: Trainer) -> None:
        with self._changed:
            self._begun = number + 1
            self._changed.notify_all()
            enough = self._ends[min(number + 1, len(self._ends) - 1)]
            assert self._changed.wait_for(lambda: self._server_is_slow or self.answered >= enough, LIMIT_SECONDS)
