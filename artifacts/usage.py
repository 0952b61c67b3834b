"""What takes how much room in a store: by kind, stage, recipe, run and name. What several share is counted once in
every total; `alone` says what of a row nothing else of its table reaches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from artifacts import collected
from artifacts.errors import DamagedError, MissingError, StoreError
from artifacts.folder import in_parallel
from artifacts.job_folders import job_folders
from artifacts.manifest import Artifact
from artifacts.retention import Lineage, outputs_of
from artifacts.stock import Lot, Stock, take_stock
from artifacts.store import Store

THREADS = 8


@dataclass(frozen=True)
class Row:
    """`artifacts` and `size`: all that the row reaches, in bytes; `alone`: what no other row of its table does."""

    name: str
    artifacts: int
    size: int
    alone: int


@dataclass
class Usage:
    """Bytes of everything. `tables`: heading -> rows, largest first."""

    artifacts: int = 0
    size: int = 0
    tables: dict[str, list[Row]] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    """What is no artifact: checkpoints, shards, rewards, records, job folders, ... -> bytes."""


def usage(store: Store) -> Usage:
    """Reads listings, manifests, names and runs."""
    stock = take_stock(store)
    sizes = {artifact: lot.size for artifact, lot in stock.artifacts.items()}
    lineage = Lineage(store, stock.artifacts)
    made = _runs(store)
    recipes: dict[str, list[Artifact]] = {}
    for recipe, outputs in made.values():
        recipes.setdefault(recipe, []).extend(outputs)
    names = {f"@{name}": [artifact] for name, artifact in store.aliases().items()}
    tables = {
        "kind": _table(_grouped(sizes, {artifact: artifact.kind for artifact in sizes}), sizes),
        "stage": _table(_grouped(sizes, _stages(store, list(sizes))), sizes),
        "recipe": _table(_reached(recipes, lineage), sizes),
        "run": _table(_reached({name: outputs for name, (_, outputs) in made.items()}, lineage), sizes),
        "alias": _table(_reached(names, lineage), sizes),
    }
    return Usage(len(sizes), sum(sizes.values()), tables, _others(store, stock))


def _grouped(artifacts: Iterable[Artifact], group: Mapping[Artifact, str]) -> dict[str, set[Artifact]]:
    groups: dict[str, set[Artifact]] = {}
    for artifact in artifacts:
        groups.setdefault(group[artifact], set()).add(artifact)
    return groups


def _reached(outputs: Mapping[str, list[Artifact]], lineage: Lineage) -> dict[str, set[Artifact]]:
    """With what they were made from."""
    return {name: set(lineage.extend(dict.fromkeys(found, ""))) for name, found in outputs.items()}


def _table(groups: Mapping[str, set[Artifact]], sizes: Mapping[Artifact, int]) -> list[Row]:
    times = Counter(artifact for members in groups.values() for artifact in members)
    rows = []
    for name, members in groups.items():
        there = [artifact for artifact in members if artifact in sizes]
        alone = sum(sizes[artifact] for artifact in there if times[artifact] == 1)
        rows.append(Row(name, len(there), sum(sizes[artifact] for artifact in there), alone))
    return sorted(rows, key=lambda row: (-row.size, row.name))


def _stages(store: Store, artifacts: list[Artifact]) -> dict[Artifact, str]:
    def stage(artifact: Artifact) -> str:
        try:
            return str(store.manifest(artifact).producer.get("stage"))
        except (DamagedError, MissingError):
            return "(damaged)"

    return dict(zip(artifacts, in_parallel(stage, artifacts, 1 if store.is_local else THREADS), strict=True))


def _runs(store: Store) -> dict[str, tuple[str, list[Artifact]]]:
    """Run -> its recipe and outputs; a run that cannot be read reaches nothing."""

    def read(run_id: str) -> tuple[str, list[Artifact]]:
        try:
            payload = store.read_run(run_id)
        except StoreError:
            return "(damaged)", []
        return str(payload.get("recipe")), outputs_of(payload)

    names = store.runs()
    return dict(zip(names, in_parallel(read, names, THREADS), strict=True))


def _others(store: Store, stock: Stock) -> dict[str, int]:
    found: Counter[str] = Counter()
    for work in stock.work.values():
        found[work.what] += work.size
    found["fragments"] = _total(stock.fragments.values())
    for name in ("index", "runs", "aliases", "claims", collected.FOLDER):
        found[name] = sum(stored.size for stored in store.files.tree(name).values())
    found["job folders"] = sum(folder.size for folder in job_folders(store.scratch)[1])
    found["temporary"] = sum(max(0, stored.size) for stored in store.files.unfinished().values())
    return {name: size for name, size in sorted(found.items()) if size}


def _total(lots: Iterable[Lot]) -> int:
    return sum(lot.size for lot in lots)
