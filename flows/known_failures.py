"""Stages that failed in a sweep for a reason of their own, which every trial that shares them would meet again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from flows.decision import Decision
from flows.recipe import RecipeStage
from flows.stage_result import StageFailed

_Key = tuple[str | None, str, str]


class KnownFailures:
    """What such stages said. Used by several threads."""

    def __init__(self) -> None:
        self._said: dict[_Key, str] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def avoided(self, stage: RecipeStage, decision: Decision, where: str) -> Iterator[None]:
        """Inside, the stage is made; an error that lasts is kept. `where`: `trial 1`, which is told to others.

        Raises StageFailed where this very stage, started in the same way, is known to fail.
        """
        key = _key(stage, decision)
        with self._lock:
            known = self._said.get(key)
        if known is not None:
            raise StageFailed(known, expected=True)
        try:
            yield
        except StageFailed as error:
            if error.lasting:
                with self._lock:
                    self._said[key] = f"{error} (in {where}; not run again)"
            raise


def _key(stage: RecipeStage, decision: Decision) -> _Key:
    """A fingerprint leaves out what changes no result; whether there is one may well hang on it."""
    return decision.fingerprint, stage.config.model_dump_json(), repr(stage.launch)
