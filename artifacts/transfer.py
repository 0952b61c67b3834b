"""Artifacts from one store into another, by way of a folder that is a store itself: every byte checked on the way,
manifests and records as they were, so that what was made there is cached here."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from artifacts import index
from artifacts.contents import PAYLOAD
from artifacts.disk import temporary_name
from artifacts.errors import DamagedError, RequestError
from artifacts.folder import differences
from artifacts.index import Record
from artifacts.local import LocalFiles
from artifacts.local_errors import reported
from artifacts.manifest import Artifact, Manifest
from artifacts.retention import Lineage, digests_in
from artifacts.store import Store


@dataclass(frozen=True)
class Moved:
    """What was copied and what was there already."""

    copied: tuple[Artifact, ...]
    there: tuple[Artifact, ...]
    records: int
    named: tuple[str, ...] = ()
    """Aliases that came along."""
    taken: tuple[str, ...] = ()
    """Aliases that mean another artifact where these went, and still do."""
    left_out: tuple[str, ...] = ()
    """Stages without their record there, and the outputs that it lacks: they would run again."""


def export(store: Store, artifacts: Iterable[Artifact], folder: Path, *, lineage: bool = False) -> Moved:
    """Copies artifacts, their names and the records of how they were made into `folder`: a new one, or one of an
    earlier export. With `lineage` also all that they were made from, and what the same work wrote besides, for a record
    counts only where all outputs are. May be repeated after a kill."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "artifacts").is_dir():
        raise RequestError(f"{folder} holds something else; name a new folder, or one of an earlier export")
    wanted, records = list(artifacts), index.every_record(store.files)
    if lineage:
        wanted = _with_all_outputs(store, wanted, records)
    return _move(store, Store(LocalFiles(folder), folder), wanted, records)


def import_(store: Store, folder: Path) -> Moved:
    """Copies everything of an exported folder into the store; a name that means another artifact there stays as it is.
    Raises RequestError for a folder that is none, DamagedError before anything that is not as its manifest says is
    seen."""
    if not (folder / "artifacts").is_dir():
        raise RequestError(f"{folder} is no exported folder: it has no folder `artifacts`")
    source = Store(LocalFiles(folder, read_only=True), folder)
    wanted = _in_order(Lineage(source, source.artifacts()), list(source.artifacts()))
    return _move(source, store, wanted, index.every_record(source.files))


def _with_all_outputs(store: Store, asked: list[Artifact], records: Mapping[str, Record]) -> list[Artifact]:
    """The lineage, and the other outputs of the work whose inputs are all in it."""
    stored = list(store.artifacts())
    lineage, digests = Lineage(store, stored), {artifact.digest for artifact in stored}
    roots = dict.fromkeys(asked)
    while True:
        wanted = _in_order(lineage, list(roots))
        inside = {artifact.digest for artifact in wanted}
        more = [
            output
            for record in _writers(records, wanted).values()
            # the same bytes may have been made from something else, which nobody asked for
            if inside.issuperset(digests.intersection(digests_in(record.identity.get("inputs"))))
            for output in record.outputs.values()
            if output not in wanted
        ]
        found = [output for output in dict.fromkeys(more) if store.is_intact(output)]
        if not found:
            return wanted
        roots |= dict.fromkeys(found)


def _writers(records: Mapping[str, Record], artifacts: Iterable[Artifact]) -> dict[str, Record]:
    """The records of work that wrote one of them."""
    wanted = set(artifacts)
    return {key: record for key, record in records.items() if not wanted.isdisjoint(record.outputs.values())}


def _in_order(lineage: Lineage, artifacts: list[Artifact]) -> list[Artifact]:
    """With their lineage, what was needed before what needed it: a kill leaves nothing without its inputs. Of works
    that gave each other's bytes, as may be, either comes first."""
    lineage.extend(dict.fromkeys(artifacts, ""))  # reads what it needs side by side
    ordered: dict[Artifact, None] = {}
    opened: set[Artifact] = set()
    waiting = list(reversed(artifacts))
    while waiting:
        artifact = waiting[-1]
        if artifact in opened:
            ordered[waiting.pop()] = None
            continue
        opened.add(artifact)
        waiting += [needed for needed in lineage.inputs_of(artifact) if needed not in opened]
    return list(ordered)


def _move(source: Store, target: Store, artifacts: list[Artifact], records: Mapping[str, Record]) -> Moved:
    there = [artifact for artifact in artifacts if target.renew(artifact)]
    copied = [artifact for artifact in artifacts if artifact not in set(there)]
    for artifact in copied:
        _copy(source, target, source.manifest(artifact))
    count, left_out = _copy_records(source, target, _writers(records, artifacts))
    wanted = set(artifacts)
    names = {name: artifact for name, artifact in source.aliases().items() if artifact in wanted}
    known = {name: target.alias(name) for name in names}
    free = {name: artifact for name, artifact in names.items() if known[name] in (None, artifact)}
    for name, artifact in free.items():
        target.set_alias(name, artifact)
    taken = tuple(name for name in names if name not in free)
    return Moved(tuple(copied), tuple(there), count, tuple(free), taken, left_out)


def _copy(source: Store, target: Store, manifest: Manifest) -> None:
    """By way of the target's scratch folder, where the bytes that will be stored are hashed."""
    local = source.files.local_root
    folder = local / manifest.artifact.key / PAYLOAD if local is not None else source.materialize(manifest.artifact)
    if local is not None:
        _require_files(source, manifest)
    copy = target.scratch / f"copy-{temporary_name()}"
    try:
        with reported("copy to", copy, needed=manifest.size):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder, copy, symlinks=True)
        if target.files.take_in(copy) != manifest.files:
            raise DamagedError(
                f"{manifest.artifact.id} ({manifest.kind}) in {source.url} is not what its manifest says; "
                f"`posttrain verify --store {source.url}` names the files"
            )
        target.adopt(manifest, copy)
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _require_files(source: Store, manifest: Manifest) -> None:
    """Nothing is copied from a folder that holds links, pipes, devices, or more than the manifest says."""
    place = f"{manifest.artifact.key}/{PAYLOAD}"
    found = {path: stored.size for path, stored in source.files.tree(place).items()}
    problems = differences(found, manifest.files)
    if problems:
        raise DamagedError(f"{source.url}/{place} is not what its manifest says: {'; '.join(problems[:5])}")


def _copy_records(source: Store, target: Store, records: Mapping[str, Record]) -> tuple[int, tuple[str, ...]]:
    """(how many were new there, what is said of work of which none is), under the names that they have."""
    count = 0
    usable: set[str] = set()
    missing: dict[str, str] = {}
    for key, record in records.items():
        gone = [name for name, artifact in record.outputs.items() if not target.is_intact(artifact)]
        if gone:
            missing[record.fingerprint] = _missing(record, gone)
            continue
        usable.add(record.fingerprint)
        folder, _, name = key.rpartition("/")
        if name not in target.files.children(folder):
            target.files.write(key, source.files.read(key))
            count += 1
    left_out = (words for fingerprint, words in missing.items() if fingerprint not in usable)
    return count, tuple(dict.fromkeys(left_out))


def _missing(record: Record, outputs: list[str]) -> str:
    """`grpo: its output rollouts`"""
    stage = record.provenance.get("stage_name") or record.stage
    return f"{stage}: its {'output' if len(outputs) == 1 else 'outputs'} {', '.join(outputs)}"
