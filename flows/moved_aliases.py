"""Aliases that a run with `--set` took from results that were made with other settings: said once, at its end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from artifacts import Artifact, Store
from artifacts.digest import canonical_json
from artifacts.errors import PosttrainError
from artifacts.sealed import scrub
from flows.recipe import Recipe

logger = logging.getLogger(__name__)

KEY = "moved"
"""In a run's payload."""
_LISTED = 3


class MovedAliases:
    """Watches the aliases of one run; one that was given a name of its own by `--set name=...` has them to itself."""

    def __init__(self, store: Store, recipe: Recipe) -> None:
        self._store, self._recipe = store, recipe
        names = {text.partition("=")[0].strip() for text in recipe.settings}
        self._settings = () if "name" in names else tuple(recipe.settings)
        self._moved: dict[str, tuple[Artifact, Artifact]] = {}

    def watch(self, stage: str, artifact: Artifact) -> None:
        """Before the stage's alias is set."""
        if self._settings and (before := self._store.alias(f"{self._recipe.name}/{stage}")) not in (None, artifact):
            self._moved[stage] = (before, artifact)

    def to_json(self) -> dict[str, Any]:
        """For the run's payload: nothing where no alias was taken."""
        try:
            own = {stage for stage, (before, after) in self._moved.items() if self._made_of(before, after)}
        except PosttrainError as error:  # the run is what it is, whatever its aliases were
            logger.warning("which aliases moved cannot be said: %s", error)
            return {}
        taken = [f"{self._recipe.name}/{stage}" for stage in self._moved if own & self._behind(stage)]
        return {KEY: {"aliases": taken, "settings": [scrub(text) for text in self._settings]}} if taken else {}

    def _made_of(self, before: Artifact, after: Artifact) -> bool:
        """Whether other settings made them: two manifests, however long their history."""
        producers = [self._store.manifest(artifact).producer for artifact in (before, after)]
        return len({canonical_json([one.get("stage"), one.get("config")]) for one in producers}) > 1

    def _behind(self, stage: str) -> set[str]:
        """The stage, and those of the recipe that it needs."""
        found, waiting = {stage}, [stage]
        while waiting:
            needs = self._recipe.stages[waiting.pop()].needs
            waiting += [need for need in needs if need not in found]
            found.update(needs)
        return found


def in_words(payload: Mapping[str, Any]) -> str | None:
    """`@mine/dpo is now of --set dpo.beta=0.5; --set name=trial keeps it apart`, of a run's payload."""
    moved = payload.get(KEY)
    if not moved:
        return None
    names = [f"@{name}" for name in moved["aliases"]]
    more = [f"{len(names) - _LISTED} more"] if len(names) > _LISTED + 1 else []
    listed = [*(names[:_LISTED] if more else names), *more]
    text = " and ".join(filter(None, [", ".join(listed[:-1]), listed[-1]]))
    settings = " ".join(f"--set {setting}" for setting in moved["settings"])
    verb, them = ("is", "it") if len(names) == 1 else ("are", "them")
    return f"{text} {verb} now of {settings}; --set name=trial keeps {them} apart"
