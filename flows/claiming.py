"""What a run uses stays in the store while it goes on, whatever is collected meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from artifacts import Artifact, Store
from artifacts.errors import StoreError

logger = logging.getLogger(__name__)


class RunClaim:
    """The claim of one run on the artifacts that it has read, made or found so far; said anew when one is added."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store, self._name = store, run_id
        self._artifacts: dict[Artifact, None] = {}
        self._lock = threading.Lock()

    def add(self, artifacts: Iterable[Artifact]) -> None:
        """When it returns, none of them is being deleted; one that has gone by then is found missing."""
        with self._lock:
            self._artifacts.update(dict.fromkeys(artifacts))
            self._store.claim(self._name, self._artifacts)

    def drop(self) -> None:
        """Takes it back: what the run's record names is kept for that."""
        try:
            self._store.unclaim(self._name)
        except StoreError as error:  # it ends with this process
            logger.warning("the claim of run %s was not taken back: %s", self._name, error)
