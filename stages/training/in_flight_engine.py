"""An engine that gets the trainer's weights amid what it is sampling, so that completions go on with newer ones."""

from __future__ import annotations

from dataclasses import replace

from stages.rollouts.requests import Completion
from stages.training.lagging_engine import Held, LaggingEngine


class InFlightEngine(LaggingEngine):
    """Gives weights in the trainer's thread, which has these then: nothing is held, and another thread samples.

    Its engine's completions say by which weights, in the order in which it got them, each token was made.
    """

    def renew(self) -> None:
        """What is being sampled goes on with the present weights."""
        self._give(self._version(), self._weights_of(self._policy()))

    def hold(self) -> tuple[Held, bool]:
        """(the version of the present weights, which the engine has from now on; whether a proof is due with them)"""
        self.renew()
        return Held(self._version(), ()), self._is_due()

    def take(self, held: Held, *, prove: bool = False) -> None:
        """It has these, or newer ones. `prove`: what is sampled next, while the trainer has the same weights and no
        others come."""
        self._proves_next = prove

    def _stamped(self, completion: Completion) -> Completion:
        return replace(completion, weight_versions=[self._given[number - 1] for number in completion.weight_versions])
