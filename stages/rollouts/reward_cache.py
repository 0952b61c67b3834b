"""Rewards that were paid for, kept in the store by what they follow from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from artifacts import Shards
from artifacts.digest import canonical_json, sha256_bytes
from artifacts.errors import StageError
from stages.held import content_in_force
from stages.identity import semantic_config
from stages.rollouts.reward_spec import RewardSpec

OpenShards = Callable[[str], Shards]
"""Digest -> the shards under it: `Store.shards`."""


class RewardCache:
    """Rewards of one function with its parameters, of all runs on a store.

    A shard holds the rewards that one call was made for, and is named by what they are of; so it can be written twice
    and by two runs at once. Only numbers are kept: None and errors may be another thing the next time.
    """

    def __init__(self, shards: Shards, name: str) -> None:
        self._shards, self._name = shards, name
        self._values: dict[str, float] | None = None

    @classmethod
    def of(cls, spec: RewardSpec, open_shards: OpenShards) -> RewardCache:
        """For a reward of a recipe."""
        return cls(open_shards(sha256_bytes(canonical_json(reward_identity(spec)))), spec.called)

    def keys(self, arguments: Mapping[str, Sequence[Any]], count: int) -> list[str]:
        """What names each of `count` completions: the digest of all that the function is given of it."""
        try:
            return [
                sha256_bytes(canonical_json({name: values[index] for name, values in arguments.items()}))
                for index in range(count)
            ]
        except (TypeError, ValueError) as error:
            raise StageError(
                f"rewards of {self._name!r} cannot be cached, since a column holds what JSON has not ({error}); "
                "set cache: false"
            ) from error

    def known(self, keys: Sequence[str]) -> dict[str, float]:
        """Those of them that are there."""
        if self._values is None:
            self._values = {}
            for data in self._shards.load_all():
                self._values |= json.loads(data)
        return {key: self._values[key] for key in keys if key in self._values}

    def save(self, found: Mapping[str, float]) -> None:
        """Durable on return."""
        if not found:
            return
        values = {key: float(value) for key, value in found.items()}
        self._shards.save(sha256_bytes(canonical_json(sorted(values))), canonical_json(values))
        self._values = {**(self._values or {}), **values}


def reward_identity(spec: RewardSpec) -> dict[str, Any]:
    """What a reward follows from but for the completion: the function's files, or the version of ours, its parameters,
    and the server that is asked. That one as a digest: an address may hold what not everybody should read."""
    built_in, meaning = spec.built_in(), semantic_config(spec, content_in_force)
    if built_in is None:
        return {"reward": meaning["name"], "parameters": meaning["parameters"]}
    parameters = {name: value for name, value in meaning["parameters"].items() if name not in built_in.operational}
    identity = {"reward": spec.name, "version": built_in.version, "parameters": parameters}
    address = built_in.asks()
    return identity if address is None else {**identity, "server": sha256_bytes(address.encode())}
