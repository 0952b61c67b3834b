"""The store: artifacts by content, the index by fingerprint, and what belongs to them."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from artifacts import aliases, claims, contents, index, lineage, listing, running, runs
from artifacts.checkpoints import Checkpoints
from artifacts.contents import DAMAGED, MANIFEST, PAYLOAD
from artifacts.errors import DamagedError, MissingError
from artifacts.files import Files, Publication
from artifacts.index import Record
from artifacts.job_folders import scratch_of
from artifacts.leases import Lease
from artifacts.manifest import Artifact, Manifest, library_versions
from artifacts.sealed import publishable
from artifacts.shards import Shards


class Store:
    """Everything that is kept. Storage errors raise StoreError; only the store's own word that something is
    not there makes it a miss. `cache` is a folder of this machine, used by remote stores."""

    def __init__(self, files: Files, cache: Path) -> None:
        self.files = files
        self.url = files.url
        self.is_local = files.local_root is not None
        self._cache = cache

    @functools.cached_property
    def scratch(self) -> Path:
        """Where this machine works for this store, and for no other one."""
        root = self.files.local_root
        return root / "scratch" if root is not None else scratch_of(self._cache, self.files.place)

    # artifacts

    def put(
        self,
        kind: str,
        folder: Path,
        *,
        producer: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
        counts: Mapping[str, Any] | None = None,
        needs: Iterable[Artifact] = (),
    ) -> Artifact:
        """Stores the files of `folder` and returns the artifact once it is durable. A local store on the same
        disk takes the files away from `folder`. The same content is stored once; the first manifest stays. `needs`:
        what it cannot be used without, which is kept as long as it is, besides what it was made from.
        Raises StoreError; then nothing is visible and `folder` is as it was."""
        entries = self.files.take_in(folder)
        manifest = Manifest(
            kind=kind,
            files=entries,
            producer=publishable(producer),
            metrics=publishable(metrics or {}),
            counts=publishable(counts or {}),
            versions=library_versions(),
            needs=tuple(sorted({one.digest for one in needs})),
        )
        return self.adopt(manifest, folder)

    def adopt(self, manifest: Manifest, folder: Path) -> Artifact:
        """`put` with a manifest that is there already, whose files are those of `folder`."""
        artifact = manifest.artifact
        # the content is only read where that costs no transfer
        if self.renew(artifact) and (not self.is_local or contents.has_every_byte(self.files, artifact)):
            return artifact
        with claims.publishing(self.files, artifact):
            marker = (MANIFEST, manifest.to_bytes())
            self.files.publish(Publication(folder, manifest.files, artifact.key, PAYLOAD, marker))
            self.files.delete(f"{artifact.key}/{DAMAGED}")
        return artifact

    def renew(self, artifact: Artifact) -> bool:
        """Whether the artifact is there and whole (by size); then its age starts anew, so that nobody deletes it
        for being old before what needs it has said so."""
        while self.is_intact(artifact):
            try:
                self.files.touch(f"{artifact.key}/{MANIFEST}")
            except FileNotFoundError:
                return False
            if not claims.await_sweep(self.files, [artifact]):
                return True
        return False

    def claim(self, name: str, artifacts: Iterable[Artifact]) -> None:
        """Says that these are in use, under a name; replaces what was claimed under it before. When it returns,
        none of them is being deleted; one that is gone by then is found missing."""
        claimed = list(artifacts)
        claims.write(self.files, name, claimed)
        claims.await_sweep(self.files, claimed)

    def unclaim(self, name: str) -> None:
        """Takes a claim back."""
        claims.drop(self.files, name)

    def manifest(self, artifact: Artifact) -> Manifest:
        """Raises MissingError when the artifact is not there, DamagedError when its manifest is not whole."""
        return contents.read_manifest(self.files, artifact)

    def is_intact(self, artifact: Artifact) -> bool:
        """Whether the manifest is whole and every file is there with its size; no content is read. What is
        wrong is named in the log."""
        return contents.is_intact(self.files, artifact)

    def materialize(self, artifact: Artifact) -> Path:
        """A local folder with exactly the artifact's files, every byte checked. On a local store it is the
        store's own folder (read-only files), else a folder of the cache. Raises MissingError, or DamagedError
        that names the files; then look-ups no longer count the artifact."""
        return contents.materialized(self.files, artifact, self._cache)

    def verify(self, artifact: Artifact) -> list[str]:
        """Rehashes everything in place. What is wrong, one line each; an artifact that is whole again counts
        again."""
        return contents.verified(self.files, artifact)

    def newest_first(self, kind: str | None = None) -> list[Artifact]:
        """Every artifact (of a kind), the one stored last first, from listings alone: what never was finished may
        be among them."""
        return listing.newest_first(self.files, kind)

    def artifacts(self, prefix: str = "") -> Iterator[Artifact]:
        """Every artifact that has a manifest and whose digest begins so, by kind and digest."""
        return listing.marked(self.files, MANIFEST, prefix)

    def find(self, reference: str, kinds: Collection[str] = ()) -> Artifact:
        """The artifact of `@alias`, `alias`, `sha256:<prefix>` or `<prefix>` (8 hex digits or more), the last
        two also as `kind/...`. Raises RequestError if there is none (with the nearest alias of these kinds) or more
        than one."""
        return aliases.find(self.files, reference, self.artifacts, kinds)

    def set_alias(self, name: str, artifact: Artifact) -> None:
        """Names an artifact, which must be there; the name may have meant another one before."""
        self.manifest(artifact)
        aliases.write(self.files, name, artifact)

    def alias(self, name: str) -> Artifact | None:
        """What a name means, if anything; a damaged one means nothing."""
        try:
            return aliases.read(self.files, name)
        except DamagedError:
            return None

    def aliases(self) -> dict[str, Artifact]:
        return aliases.read_all(self.files)

    def lineage(self, artifact: Artifact) -> dict[str, Any]:
        """`{"artifact", "kind", "stage", "fingerprint", "inputs": {name: tree}}`, from the manifests."""
        return lineage.tree(artifact, self.manifest, self.artifacts)

    # the index

    def append_record(self, record: Record) -> None:
        """Adds a record; nothing is ever overwritten."""
        index.append(self.files, record)

    def records(self, stage: str, fingerprint: str) -> list[Record]:
        """Records of a fingerprint, newest first, whether or not their artifacts are still whole."""
        return index.records(self.files, stage, fingerprint)

    def stage_records(self, stage: str, newest: int | None = None) -> list[Record]:
        """Records of every fingerprint of a stage, or of so many that had one last, newest first."""
        return index.stage_records(self.files, stage, newest)

    def records_behind(self, artifact: Artifact) -> list[Record]:
        """Records of the work that made an artifact first, newest first; none where its manifest cannot be read."""
        try:
            producer = dict(self.manifest(artifact).producer)
        except (DamagedError, MissingError):
            return []
        stage = str(producer.get("stage"))
        return self.records(stage, index.fingerprint_of(producer)) if index.STAGE.fullmatch(stage) else []

    def lookup(self, stage: str, fingerprint: str) -> Record | None:
        """The newest record whose outputs are all whole (by size), or None. Storage errors raise."""
        for record in self.records(stage, fingerprint):
            if all(self.is_intact(artifact) for artifact in record.outputs.values()):
                return record
        return None

    # work in progress, runs

    def checkpoints(self, fingerprint: str, keep: int = 2) -> Checkpoints:
        return Checkpoints(self.files, fingerprint, keep, self._cache)

    def shards(self, fingerprint: str) -> Shards:
        return Shards(self.files, fingerprint)

    def lease(self, fingerprint: str, owner: str, ttl_seconds: float = 60) -> Lease:
        return Lease(self.files, fingerprint, owner, ttl_seconds)

    def write_run(self, run_id: str, payload: Mapping[str, Any]) -> None:
        runs.write(self.files, run_id, payload)

    def write_running(self, run_id: str, payload: Mapping[str, Any]) -> None:
        """What this process has done so far of a run that goes on."""
        running.write(self.files, run_id, payload)

    def read_run(self, run_id: str) -> dict[str, Any]:
        """Raises RequestError for an unknown run. One whose process is gone without a word is `killed`."""
        return running.read(self.files, run_id, self.scratch)

    def runs(self) -> list[str]:
        """Ids of the runs, the one written last first."""
        return runs.names(self.files)
