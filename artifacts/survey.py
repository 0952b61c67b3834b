"""What garbage collection would delete and what it keeps, each with its reason. Nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from artifacts import claims, index
from artifacts.errors import StoreError
from artifacts.job_folders import JobFolder, job_folders, run_pages
from artifacts.manifest import Artifact
from artifacts.retention import DAY, GROUNDS, HOUR, Lineage, Policy, Roots, find_roots
from artifacts.stock import Lot, Stock, Work, take_stock
from artifacts.store import Store
from artifacts.work_names import work_names


@dataclass(frozen=True)
class Item:
    """One thing in the store. `name`: its key, the name of a job folder, or the path of a run's page; `written`: when
    it was last written or used, by the store's clock; whoever deletes spares what is younger by then."""

    what: str
    name: str
    size: int
    reason: str
    written: float = 0.0
    artifact: Artifact | None = None
    of: str = ""
    """Unfinished work: `recipe/stage`, where the store knows it."""

    @property
    def ground(self) -> str:
        """The reason without its names, to count by."""
        return next((ground for ground in GROUNDS if self.reason.startswith(ground)), self.reason)


@dataclass
class Survey:
    """What goes and what stays. `problems`: manifests that cannot be read, so that what they needed may go."""

    policy: Policy
    lineage: Lineage = field(repr=False)
    goes: list[Item] = field(default_factory=list)
    stays: list[Item] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    workers: tuple[str, ...] = ()
    """Fingerprints that are being worked on."""

    def enter(self, item: Item, kept: bool) -> None:
        (self.stays if kept else self.goes).append(item)


def survey(store: Store, policy: Policy, pages: Path | None = None) -> Survey:
    """Looks at everything. `pages`: a folder with pages of runs, of which those of this store's runs count. Raises
    StoreError where it cannot be known what must stay: an alias, a run or a claim that cannot be read."""
    now, stock = store.files.now(), take_stock(store)
    young = now - policy.grace_hours * HOUR
    roots = find_roots(store, policy, now, _perhaps_worked_on(stock, now))
    found = Survey(policy, Lineage(store, stock.artifacts), workers=tuple(roots.workers))
    _enter_artifacts(stock, roots, young, found)
    _enter_work(store, stock.work, roots, now, found)
    for name, modified in roots.dead_claims.items():
        found.enter(Item("claim", f"claims/{name}.json", 0, "its process is gone", modified), kept=False)
    here, folders = job_folders(store.scratch)
    for folder in folders:
        _enter_job_folder(folder, roots, here - folder.written, found)
    if pages is not None:
        _enter_pages(store, pages, roots, found)
    for key, stored in sorted(store.files.unfinished().items()):
        kept = stored.modified >= young
        reason = f"written in the last {policy.grace_hours:g} h" if kept else "its writer never finished it"
        found.enter(Item("temporary", key, max(0, stored.size), reason, stored.modified), kept)
    return found


def _perhaps_worked_on(stock: Stock, now: float) -> list[str]:
    """A lease that is held is renewed every few seconds: those of other days need no look."""
    return [name for name, work in stock.work.items() if work.leased is not None and work.leased > now - DAY]


def _enter_artifacts(stock: Stock, roots: Roots, young: float, found: Survey) -> None:
    recent = f"stored or used in the last {found.policy.grace_hours:g} h"
    roots.add((artifact for artifact, lot in stock.artifacts.items() if lot.manifest >= young), recent)
    kept = found.lineage.extend(roots.reasons)
    found.problems += found.lineage.problems
    for artifact, lot in stock.artifacts.items():
        reason = kept.get(artifact, "nothing that is kept needs it")
        item = Item("artifact", artifact.key, lot.size, reason, lot.manifest, artifact)
        found.enter(item, artifact in kept)
    for artifact, lot in stock.fragments.items():
        item = Item("fragment", artifact.key, lot.size, _fragment(lot, young), lot.written, artifact)
        found.enter(item, lot.written >= young or artifact in roots.claimed)


def _fragment(lot: Lot, young: float) -> str:
    return "may still be written" if lot.written >= young else "it has no manifest, so it never was an artifact"


def _enter_work(store: Store, work: Mapping[str, Work], roots: Roots, now: float, found: Survey) -> None:
    finished = {
        name: stage for stage in store.files.children("index") for name in store.files.children(f"index/{stage}")
    }
    # what caches rewards is no stage's
    names = work_names(store, (name for name, lot in work.items() if lot.files and not lot.holds_rewards), finished)
    for fingerprint, lot in sorted(work.items()):
        if fingerprint != claims.SWEEPER:
            is_finished = fingerprint in finished and _is_finished(store, finished[fingerprint], fingerprint)
            reason, kept = _work_reason(fingerprint, lot, roots, now, found.policy, is_finished)
            name = f"work/{fingerprint}"
            last = max(lot.written, lot.leased or 0.0)
            found.enter(Item(lot.what, name, lot.size, reason, last, of=names.get(fingerprint, "")), kept)


def _is_finished(store: Store, stage: str, fingerprint: str) -> bool:
    """Whether it would not run again: a record whose outputs are gone, or that cannot be read, ends nothing."""
    try:
        return index.STAGE.fullmatch(stage) is not None and store.lookup(stage, fingerprint) is not None
    except StoreError:
        return False


def _work_reason(
    fingerprint: str, lot: Work, roots: Roots, now: float, policy: Policy, finished: bool
) -> tuple[str, bool]:
    """(why, whether it is kept)"""
    if fingerprint in roots.workers:
        return f"run {roots.workers[fingerprint]} works on it", True
    if now - max(lot.written, lot.leased or 0.0) < policy.grace_hours * HOUR:
        return f"written in the last {policy.grace_hours:g} h", True
    if lot.holds_rewards:
        kept = now - lot.written < policy.keep_reward_days * DAY
        return f"rewards, {'paid' if kept else 'none paid'} in the last {policy.keep_reward_days:g} days", kept
    if not lot.files:
        return "nobody holds the lease", False
    if finished:
        return "the stage is finished", False
    kept = now - lot.written < policy.keep_days * DAY
    return ("can be taken up" if kept else f"nobody took it up for {policy.keep_days:g} days"), kept


def _enter_job_folder(folder: JobFolder, roots: Roots, age: float, found: Survey) -> None:
    reason, kept = _run_reason(folder.name, roots, age, found.policy)
    found.enter(Item("job folder", folder.name, folder.size, reason, folder.written), kept)


def _enter_pages(store: Store, pages: Path, roots: Roots, found: Survey) -> None:
    here, paths = run_pages(pages, store.runs())
    for run, path in paths:
        status = path.stat()
        reason, kept = _run_reason(run, roots, here - status.st_mtime, found.policy)
        found.enter(Item("page", str(path), status.st_size, reason, status.st_mtime), kept)


def _run_reason(run: str, roots: Roots, age: float, policy: Policy) -> tuple[str, bool]:
    """(why, whether it is kept)"""
    if run in roots.runs:
        return "of a run that is kept", True
    if age < policy.grace_hours * HOUR:
        return f"written in the last {policy.grace_hours:g} h", True
    return "of a run that is not kept", False
