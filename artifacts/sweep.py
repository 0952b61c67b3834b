"""Deleting what a survey found, beside everything else that goes on in the store, killed at any point or not.

A manifest goes before its files, so what a killed sweep leaves is a fragment that the next one clears away. Records
and runs are never deleted: they are small, and say what there was.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from artifacts import claims, collected
from artifacts.contents import MANIFEST
from artifacts.errors import StoreError
from artifacts.folder import in_parallel
from artifacts.job_folders import job_folder
from artifacts.leases import Lease
from artifacts.local_errors import reported
from artifacts.manifest import Artifact
from artifacts.retention import find_roots
from artifacts.store import Store
from artifacts.survey import Item, Survey

BATCH = 1000
"""Artifacts that are condemned at a time: whoever wants one of them waits for no more deletions than these."""
THREADS = 4


@dataclass
class Swept:
    """What was deleted, and what was spared because it was used since the survey."""

    deleted: list[Item]
    spared: list[Item]


def sweep(store: Store, found: Survey, owner: str) -> Swept:
    """Deletes what goes. Raises StoreError when another one is at it, or has taken over because this one stood
    still for long; what is deleted by then is deleted as a whole."""
    lease = _Kept(store.lease(claims.SWEEPER, owner))
    swept = Swept([], [])
    try:
        try:
            for batch in _batches([item for item in found.goes if item.artifact is not None]):
                _sweep_artifacts(store, found, batch, lease, swept)
        finally:
            if lease.held:  # else it is another one's; without a batch it is of one that died
                claims.acquit(store.files)
        for item in found.goes:
            if item.artifact is None:
                lease.check()
                gone = _DELETE[item.what](store, item)
                (swept.deleted if gone else swept.spared).append(item)
    finally:
        lease.give_back()
    return swept


class _Kept:
    """A lease that is renewed between deletions; nothing is deleted without it."""

    def __init__(self, lease: Lease, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease, self._clock, self._renewed = lease, clock, clock()
        if not lease.acquire():
            owner = (lease.holder() or {}).get("owner", "somebody")
            raise StoreError(f"cannot collect garbage: {owner} is at it already; wait until that has ended")

    @property
    def held(self) -> bool:
        return self._lease.held

    def check(self) -> None:
        if self._clock() - self._renewed > self._lease.renew_every:
            self._renewed = self._clock()
            self._lease.renew()
        if not self.held:
            raise StoreError("garbage collection stood still for so long that another one may be at it; run it again")

    def give_back(self) -> None:
        self._lease.release()


def _batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _sweep_artifacts(store: Store, found: Survey, batch: Sequence[Item], lease: _Kept, swept: Swept) -> None:
    """Says what goes, then looks whether anybody uses it by now, then deletes."""
    lease.check()
    condemned = {item.artifact: item for item in batch if item.artifact is not None}
    claims.condemn(store.files, condemned)
    needed = _needed_now(store, found, list(condemned))

    def delete(artifact: Artifact) -> bool:
        lease.check()
        return artifact not in needed and _delete_artifact(store, artifact, condemned[artifact])

    gone = in_parallel(delete, condemned, 1 if store.is_local else THREADS)
    went = [found for (found, item), done in zip(condemned.items(), gone, strict=True) if _is_result(item, done)]
    collected.note(store.files, went)
    for item, deleted in zip(condemned.values(), gone, strict=True):
        (swept.deleted if deleted else swept.spared).append(item)


def _is_result(item: Item, deleted: bool) -> bool:
    """Whether it was an artifact, not what a put or a sweep that was killed had left of one."""
    return deleted and item.what == "artifact"


def _needed_now(store: Store, found: Survey, condemned: list[Artifact]) -> set[Artifact]:
    """Which of them aliases, claims and runs reach by now."""
    roots = find_roots(store, found.policy, store.files.now(), found.workers)
    reached = found.lineage.extend(roots.reasons)
    return {artifact for artifact in condemned if artifact in reached or artifact in roots.claimed}


def _delete_artifact(store: Store, artifact: Artifact, item: Item) -> bool:
    there = store.files.tree(artifact.key)
    marked = there.get(MANIFEST)
    written = marked.modified if marked is not None else max((stored.modified for stored in there.values()), default=0)
    if written > item.written:
        return False
    store.files.remove(artifact.key, first=MANIFEST)
    return True


def _delete_work(store: Store, item: Item) -> bool:
    """Under the lease of the fingerprint, so that nobody takes the work up meanwhile."""
    lease = store.lease(item.name.removeprefix("work/"), "gc")
    before = store.files.tree(item.name)
    if any(stored.modified > item.written for stored in before.values()) or not lease.acquire():
        return False
    after = store.files.tree(item.name)
    if any(stored != after.get(path) for path, stored in before.items() if path != "lease.json"):
        lease.release()
        return False
    for name in store.files.children(item.name):
        if name != "lease.json":
            store.files.remove(f"{item.name}/{name}")
    store.files.remove(item.name)
    return True


def _delete_claim(store: Store, item: Item) -> bool:
    store.files.delete(item.name)
    return True


def _delete_job_folder(store: Store, item: Item) -> bool:
    path = store.scratch / item.name
    with reported("delete", path):
        if job_folder(path).written > item.written:
            return False
        shutil.rmtree(path)
    return True


def _delete_page(store: Store, item: Item) -> bool:
    path = Path(item.name)
    with reported("delete", path), contextlib.suppress(FileNotFoundError):
        if path.stat().st_mtime > item.written:
            return False
        path.unlink()
    return True


def _delete_temporary(store: Store, item: Item) -> bool:
    store.files.abandon(item.name)
    return True


_DELETE: dict[str, Callable[[Store, Item], bool]] = {
    "checkpoints": _delete_work,
    "shards": _delete_work,
    "rewards": _delete_work,
    "lease": _delete_work,
    "claim": _delete_claim,
    "job folder": _delete_job_folder,
    "page": _delete_page,
    "temporary": _delete_temporary,
}
