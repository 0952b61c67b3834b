"""Aliases that a run with `--set` took from results that were made with other settings: said once, at its end."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from artifacts import Artifact, Store
from artifacts.digest import canonical_json
from artifacts.errors import PosttrainError
from artifacts.sealed import scrub

logger = logging.getLogger(__name__)

KEY = "moved"
"""In a run's payload."""
_LISTED = 3


class MovedAliases:
    """Watches the aliases of one run; one that was given a name of its own by `--set name=...` has them to itself."""

    def __init__(self, store: Store, settings: Sequence[str]) -> None:
        self._store = store
        names = {text.partition("=")[0].strip() for text in settings}
        self._settings = () if "name" in names else tuple(settings)
        self._moved: dict[str, tuple[Artifact, Artifact]] = {}

    def watch(self, alias: str, artifact: Artifact) -> None:
        """Before it is set."""
        if self._settings and (before := self._store.alias(alias)) not in (None, artifact):
            self._moved[alias] = (before, artifact)

    def to_json(self) -> dict[str, Any]:
        """For the run's payload: nothing where no alias was taken."""
        try:
            taken = [name for name, (before, after) in self._moved.items() if self._differ(before, after)]
        except PosttrainError as error:  # the run is what it is, whatever its aliases were
            logger.warning("which aliases moved cannot be said: %s", error)
            return {}
        return {KEY: {"aliases": taken, "settings": [scrub(text) for text in self._settings]}} if taken else {}

    def _differ(self, before: Artifact, after: Artifact) -> bool:
        return self._made_with(before) != self._made_with(after)

    def _made_with(self, artifact: Artifact) -> set[bytes]:
        """The settings of every stage that it was made by."""
        return set(self._settings_in(self._store.lineage(artifact)))

    def _settings_in(self, tree: Any) -> Iterator[bytes]:
        for branch in tree if isinstance(tree, list) else [tree]:
            if branch.get("stage"):
                producer = self._store.manifest(Artifact(branch["kind"], _digest(branch["artifact"]))).producer
                yield canonical_json([branch["stage"], producer.get("config")])
            for inputs in branch["inputs"].values():
                yield from self._settings_in(inputs)


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


def _digest(identifier: str) -> str:
    return identifier.removeprefix("sha256:")
