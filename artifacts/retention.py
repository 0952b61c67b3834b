"""Which artifacts garbage collection keeps, and why: what names, runs and claims reach, and what is young."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from artifacts import aliases, claims, runs
from artifacts.digest import is_sha256
from artifacts.errors import DamagedError, MissingError, RequestError, StoreError
from artifacts.folder import in_parallel
from artifacts.leases import Lease
from artifacts.manifest import Artifact
from artifacts.owner import is_dead, lives_here
from artifacts.store import Store

DAY, HOUR = 86400.0, 3600.0
CLAIM_DAYS = 7.0
"""A claim from another machine counts so long after it was last said; a run says it anew with every stage."""
GROUNDS = NAMED, IN_USE, OF_RUN, NEEDED = "named", "in use by", "made or used by run", "needed to make"
THREADS = 8


@dataclass(frozen=True)
class Policy:
    """What is kept: what aliases name, what the newest runs made (so many of them, and all so young), what runs in
    progress use, all that these were made from, and everything that was stored or used again a short time ago."""

    keep_runs: int = 20
    keep_days: float = 30.0
    grace_hours: float = 24.0
    keep_reward_days: float = 180.0

    def __post_init__(self) -> None:
        if self.keep_runs < 0 or min(self.keep_days, self.grace_hours, self.keep_reward_days) < 0:
            raise RequestError(f"what gc keeps is counted in numbers of 0 and more, found {self}")


@dataclass
class Roots:
    """Artifact -> why it is kept, the first reason found; and what else must stay."""

    reasons: dict[Artifact, str] = field(default_factory=dict)
    runs: set[str] = field(default_factory=set)
    """Runs whose job folders stay."""
    dead_claims: dict[str, float] = field(default_factory=dict)
    """Claim whose process is gone -> when it was last said."""
    workers: dict[str, str] = field(default_factory=dict)
    """Fingerprint that is being worked on -> by which run."""

    claimed: set[Artifact] = field(default_factory=set)
    """What somebody works with, there or not."""

    def add(self, artifacts: Iterable[Artifact], reason: str) -> None:
        for artifact in artifacts:
            self.reasons.setdefault(artifact, reason)


def find_roots(store: Store, policy: Policy, now: float, worked_on: Iterable[str] = ()) -> Roots:
    """`now` is the store's time; `worked_on`: fingerprints whose leases may be held. Raises DamagedError for an
    alias, run or claim that cannot be read: what it keeps is not known."""
    roots = Roots()
    for fingerprint in worked_on:
        holder = Lease(store.files, fingerprint, "gc").holder()
        if holder is not None:
            roots.workers[fingerprint] = holder["owner"]
    for name, artifact in _aliases(store):
        roots.add([artifact], f"{NAMED} @{name}")
    for claim in claims.read_all(store.files):
        if _is_live(claim, now, set(roots.workers.values())):
            roots.add(claim.artifacts, f"{IN_USE} {claim.name}")
            roots.claimed.update(claim.artifacts)
            roots.runs.add(claim.name)
        else:
            roots.dead_claims[claim.name] = claim.modified
    for run_id in recent_runs(store, policy, now):
        roots.runs.add(run_id)
        roots.add(outputs_of(_run(store, run_id)), f"{OF_RUN} {run_id}")
    return roots


def _aliases(store: Store) -> list[tuple[str, Artifact]]:
    names = [path.removesuffix(".json") for path in sorted(store.files.tree("aliases"))]
    found = in_parallel(lambda name: (name, aliases.read(store.files, name)), names, THREADS)
    return [(name, artifact) for name, artifact in found if artifact is not None]


def _is_live(claim: claims.Claim, now: float, workers: set[str]) -> bool:
    if is_dead(claim.process):
        return False
    return lives_here(claim.process) or claim.name in workers or now - claim.modified < CLAIM_DAYS * DAY


def recent_runs(store: Store, policy: Policy, now: float) -> list[str]:
    """The newest runs, by number and by age, newest first."""
    found = sorted(runs.written(store.files), reverse=True)
    return [
        name
        for position, (modified, name) in enumerate(found)
        if position < policy.keep_runs or now - modified < policy.keep_days * DAY
    ]


def _run(store: Store, run_id: str) -> Mapping[str, Any]:
    try:
        return runs.read(store.files, run_id)
    except DamagedError as error:
        raise StoreError(f"{error}; what it made is not known, so nothing is deleted; delete that file") from None


def outputs_of(payload: Mapping[str, Any]) -> list[Artifact]:
    """The artifacts of a run's stages, made or taken from the store."""
    found = []
    for stage in (payload.get("stages") or {}).values():
        for output in (stage.get("outputs") or {}).values():
            try:
                found.append(Artifact.from_json(output))
            except (KeyError, TypeError, AttributeError, RequestError):
                continue
    return found


class Lineage:
    """Follows artifacts to what they were made from; each manifest is read once."""

    def __init__(self, store: Store, artifacts: Iterable[Artifact]) -> None:
        self._store = store
        self._by_digest: dict[str, list[Artifact]] = {}
        for artifact in artifacts:
            self._by_digest.setdefault(artifact.digest, []).append(artifact)
        self._inputs: dict[Artifact, list[Artifact]] = {}
        self.problems: list[str] = []
        """Manifests that could not be read: what those artifacts were made from is not known."""

    def extend(self, reasons: Mapping[Artifact, str]) -> dict[Artifact, str]:
        """`reasons`, and for everything that these were made from that it was."""
        kept = dict(reasons)
        layer = list(kept)
        while layer:
            found = in_parallel(self.inputs_of, layer, THREADS if self._store.files.local_root is None else 1)
            above, layer = layer, []
            for artifact, inputs in zip(above, found, strict=True):
                for needed in inputs:
                    if needed not in kept:
                        kept[needed] = f"{NEEDED} {artifact.kind} {artifact.digest[:12]}"
                        layer.append(needed)
        return kept

    def inputs_of(self, artifact: Artifact) -> list[Artifact]:
        """What it was made from or cannot be used without, as far as that is there."""
        if artifact not in self._inputs:
            self._inputs[artifact] = self._read(artifact)
        return self._inputs[artifact]

    def _read(self, artifact: Artifact) -> list[Artifact]:
        try:
            manifest = self._store.manifest(artifact)
        except MissingError:
            return []
        except DamagedError as error:
            self.problems.append(str(error))
            return []
        named = [*digests_in(manifest.producer.get("inputs") or {}), *manifest.needs]
        return [found for digest in named for found in self._by_digest.get(digest, ())]


def digests_in(value: Any) -> list[str]:
    """Every digest anywhere in the inputs that a manifest names, in whatever form."""
    if isinstance(value, str):
        digest = value.removeprefix("sha256:")
        return [digest] if is_sha256(digest) else []
    if isinstance(value, Mapping):
        return [digest for item in value.values() for digest in digests_in(item)]
    if isinstance(value, list | tuple):
        return [digest for item in value for digest in digests_in(item)]
    return []
