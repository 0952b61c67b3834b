"""Artifacts from one store into another, by way of a folder that is a store itself: every byte checked on the way,
manifests and records as they were, so that what was made there is cached here."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from artifacts import index
from artifacts.disk import temporary_name
from artifacts.errors import DamagedError, RequestError
from artifacts.folder import differences
from artifacts.index import Record
from artifacts.keeping import Lineage
from artifacts.local import LocalFiles
from artifacts.local_errors import reported
from artifacts.manifest import Artifact, Manifest
from artifacts.store import PAYLOAD, Store


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


def export(store: Store, artifacts: Iterable[Artifact], folder: Path, *, lineage: bool = False) -> Moved:
    """Copies artifacts, with `lineage` also all that they were made from, their names and the records of how, into
    `folder`: a new one, or one of an earlier export. May be repeated after a kill."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "artifacts").is_dir():
        raise RequestError(f"{folder} holds something else; name a new folder, or one of an earlier export")
    wanted = list(artifacts)
    if lineage:
        wanted = _in_order(Lineage(store, store.artifacts()), wanted)
    return _move(store, Store(LocalFiles(folder), folder), wanted)


def import_(store: Store, folder: Path) -> Moved:
    """Copies everything of an exported folder into the store; a name that means another artifact there stays as it is.
    Raises RequestError for a folder that is none, DamagedError before anything that is not as its manifest says is
    seen."""
    if not (folder / "artifacts").is_dir():
        raise RequestError(f"{folder} is no exported folder: it has no folder `artifacts`")
    source = Store(LocalFiles(folder, read_only=True), folder)
    return _move(source, store, _in_order(Lineage(source, source.artifacts()), list(source.artifacts())))


def _in_order(lineage: Lineage, artifacts: list[Artifact]) -> list[Artifact]:
    """With their lineage, what was needed before what needed it: a kill leaves nothing without its inputs."""
    reached = lineage.extend(dict.fromkeys(artifacts, ""))
    return list(reversed(reached))


def _move(source: Store, target: Store, artifacts: list[Artifact]) -> Moved:
    there = [artifact for artifact in artifacts if target.renew(artifact)]
    copied = [artifact for artifact in artifacts if artifact not in set(there)]
    for artifact in copied:
        _copy(source, target, source.manifest(artifact))
    records = sum(_copy_records(source, target, source.manifest(artifact)) for artifact in artifacts)
    wanted = set(artifacts)
    names = {name: artifact for name, artifact in source.aliases().items() if artifact in wanted}
    known = {name: target.alias(name) for name in names}
    free = {name: artifact for name, artifact in names.items() if known[name] in (None, artifact)}
    for name, artifact in free.items():
        target.set_alias(name, artifact)
    return Moved(tuple(copied), tuple(there), records, tuple(free), tuple(name for name in names if name not in free))


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


def _copy_records(source: Store, target: Store, manifest: Manifest) -> int:
    """Records of the work that made it, under the names that they have: twice the same is once."""
    stage, fingerprint = manifest.producer.get("stage"), index.fingerprint_of(manifest.producer)
    if not isinstance(stage, str) or not index.STAGE.fullmatch(stage):
        return 0
    key, count = f"index/{stage}/{fingerprint}", 0
    known = set(target.files.children(key))
    for name in source.files.children(key):
        data = source.files.read(f"{key}/{name}")
        record = Record.from_bytes(data, f"{source.url}/{key}/{name}")
        ours = index.NAME.fullmatch(name) and (record.stage, record.fingerprint) == (stage, fingerprint)
        if ours and name not in known and all(target.is_intact(artifact) for artifact in record.outputs.values()):
            target.files.write(f"{key}/{name}", data)
            count += 1
    return count
