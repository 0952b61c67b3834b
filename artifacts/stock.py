"""Everything that lies in a store, from its listings alone: no content is read."""

from __future__ import annotations

from dataclasses import dataclass, field

from artifacts.contents import MANIFEST
from artifacts.digest import is_sha256
from artifacts.errors import RequestError
from artifacts.files import Stored
from artifacts.manifest import Artifact
from artifacts.shards import Shards
from artifacts.store import Store


@dataclass
class Lot:
    """The files below one key. `written`: when the youngest of them was, by the store's clock."""

    size: int = 0
    files: int = 0
    written: float = 0.0
    manifest: float = 0.0
    """When an artifact's manifest was written or made young again; 0: it has none."""

    def add(self, stored: Stored) -> None:
        self.size += max(0, stored.size)
        self.files += 1
        self.written = max(self.written, stored.modified)


@dataclass
class Work(Lot):
    """What lies under one fingerprint."""

    checkpoints: int = 0
    shards: int = 0
    rewards: int = 0
    """Shards named by a digest, as the cache of rewards names them."""
    leased: float | None = None
    """When the lease was written, if there is one."""

    @property
    def holds_rewards(self) -> bool:
        return self.rewards > 0 and self.rewards == self.shards and not self.checkpoints

    @property
    def what(self) -> str:
        """`rewards`, `checkpoints`, `shards`, or `lease` where there is nothing else."""
        if self.holds_rewards:
            return "rewards"
        return "checkpoints" if self.checkpoints else "shards" if self.shards else "lease"


@dataclass
class Stock:
    """`artifacts` with a manifest, `fragments` without one (an upload that never ended, a deletion cut short)."""

    artifacts: dict[Artifact, Lot] = field(default_factory=dict)
    fragments: dict[Artifact, Lot] = field(default_factory=dict)
    work: dict[str, Work] = field(default_factory=dict)


def take_stock(store: Store) -> Stock:
    """Lists artifacts and work."""
    return Stock(*_artifacts(store), _work(store))


def _artifacts(store: Store) -> tuple[dict[Artifact, Lot], dict[Artifact, Lot]]:
    lots: dict[tuple[str, str], Lot] = {}
    for path, stored in store.files.tree("artifacts").items():
        parts = path.split("/", 2)
        if len(parts) < 3:
            continue
        lot = lots.setdefault((parts[0], parts[1]), Lot())
        lot.add(stored)
        if parts[2] == MANIFEST:
            lot.manifest = stored.modified
    whole: dict[Artifact, Lot] = {}
    fragments: dict[Artifact, Lot] = {}
    for (kind, digest), lot in lots.items():
        try:
            artifact = Artifact(kind, digest)
        except RequestError:
            continue  # nothing of ours
        (whole if lot.manifest else fragments)[artifact] = lot
    return whole, fragments


def _work(store: Store) -> dict[str, Work]:
    found: dict[str, Work] = {}
    for path, stored in store.files.tree("work").items():
        fingerprint, _, rest = path.partition("/")
        if not is_sha256(fingerprint) or not rest:
            continue
        lot = found.setdefault(fingerprint, Work())
        if rest == "lease.json":
            lot.leased = stored.modified
            continue
        lot.add(stored)
        lot.checkpoints += rest.startswith("checkpoints/")
        if rest.startswith("shards/"):
            lot.shards += 1
            lot.rewards += is_sha256(Shards.name_of(rest.removeprefix("shards/")))
    return found
