"""A run in the store, from its first moment on: for whoever looks while it goes on, or after it was killed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from artifacts.errors import StoreError
from flows.decision import Decision
from flows.entries import Entry, running_entry, waiting_entry
from flows.plan import Plan

logger = logging.getLogger(__name__)


class RunRecord:
    """Rewritten when a stage begins or ends. Several threads may write: nothing older comes after, nor after the end.

    `so_far` gives the run's payload with the stages that have ended.
    """

    def __init__(self, plan: Plan, run_id: str, so_far: Callable[[], Mapping[str, Any]]) -> None:
        self._plan, self._id, self._so_far = plan, run_id, so_far
        self._at_work: dict[str, Entry] = {}
        self._lock = threading.Lock()
        self._ended = False

    def begin(self, name: str, decision: Decision) -> None:
        """A stage is worked on."""
        with self._lock:
            self._at_work[name] = running_entry(self._plan.recipe.stages[name], decision)
        self.write()

    def write(self) -> None:
        """Says what is done so far. A store that fails is named in the log: the end is written all the same."""
        with self._lock:
            if self._ended:
                return
            payload = self._so_far()
            stages = {name: self._entry(name, payload["stages"]) for name in self._plan.recipe.stages}
            try:
                self._plan.store.write_running(self._id, {**payload, "stages": stages})
            except StoreError as error:
                logger.warning("the store does not say how far run %s is: %s", self._id, error)

    def end(self, payload: Mapping[str, Any]) -> None:
        """Says how the run ended. Storage errors raise."""
        with self._lock:
            self._ended = True
            self._plan.store.write_run(self._id, payload)

    def _entry(self, name: str, ended: Mapping[str, Entry]) -> Entry:
        known = ended.get(name) or self._at_work.get(name)
        return known or waiting_entry(self._plan.recipe.stages[name], self._plan.decisions[name])
