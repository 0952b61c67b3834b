"""What an artifact was made of, down to the files, and what was made of it: manifests and records of a store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from artifacts import Artifact, Record, Store
from artifacts.digest import is_sha256
from artifacts.errors import DamagedError, MissingError, PosttrainError
from flows.reporting.reading import Reader
from flows.reporting.wiring import read_wiring
from flows.written import named
from stages import stage as registry

DEEPEST = 100
"""Generations that are shown at once."""


@dataclass(frozen=True)
class Node:
    """One artifact, or something from outside (`identifier` is then a folder's digest or a Hub name, `kind` empty).

    `role`: the input of the node above that it is; upwards, the input that it took the node above as. `below`: what it
    was made of, or upwards, what was made of it; empty where `repeated`, for that stands further up.
    """

    role: str
    identifier: str
    kind: str = ""
    name: str = ""
    """An alias."""
    uses: str = ""
    stage: str = ""
    """As a recipe calls it."""
    run: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """The main one of its stage; of a dataset its own rows."""
    sources: tuple[Mapping[str, Any], ...] = ()
    """Files with `file`, `sha256` and `rows`, of a dataset that came from outside."""
    note: str = ""
    repeated: bool = False
    below: tuple[Node, ...] = ()

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        for node in self.below:
            yield from node.walk()

    def to_json(self, below: str = "inputs") -> dict[str, Any]:
        """For `posttrain lineage --json`; what is empty is left out."""
        own = {name: value for name, value in vars(self).items() if value and name != "below"}
        return {**own, below: [node.to_json(below) for node in self.below]}


class Ancestry:
    """Reads the records of a store once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.reader = Reader(store)
        self._runs: dict[str, Mapping[str, Any]] = {}
        self._descriptions: dict[Artifact, Mapping[str, Any]] = {}

    def down(self, artifact: Artifact) -> Node:
        """All that it was made of."""
        return self._down("", artifact, set(), DEEPEST)

    def up(self, artifact: Artifact) -> Node:
        """All that was made of it, whichever stage of whichever recipe made it."""
        return self._up("", artifact, set(), DEEPEST)

    def record_of(self, artifact: Artifact) -> Record | None:
        """The first record that wrote it; None: there is none (any more)."""
        return next(iter(self._made.get(artifact.digest, ())), None)

    def _down(self, role: str, artifact: Artifact, seen: set[str], depth: int) -> Node:
        try:
            producer = self.store.manifest(artifact).producer
        except (MissingError, DamagedError) as error:
            return Node(role, artifact.id, artifact.kind, self._names.get(artifact, ""), note=str(error))
        inputs = producer.get("inputs") or {}
        if artifact.id in seen and inputs:
            return self._node(role, artifact, repeated=True)
        if depth == 0 and inputs:
            return self._node(role, artifact, note=f"goes on: posttrain lineage {artifact.id}")
        seen.add(artifact.id)
        below = [
            self._input(name, str(digest), seen, depth - 1)
            for name, digests in inputs.items()
            for digest in (digests if isinstance(digests, list) else [digests])
        ]
        sources = () if below or artifact.kind != "dataset" else tuple(self.sources(artifact))
        return self._node(role, artifact, below=tuple(below), sources=sources)

    def _input(self, role: str, digest: str, seen: set[str], depth: int) -> Node:
        bare = digest.removeprefix("sha256:")
        found = next(iter(self.store.artifacts(bare)), None) if is_sha256(bare) else None
        if found is None:
            return Node(role, digest, note="from outside the store")
        return self._down(role, found, seen, depth)

    def _up(self, role: str, artifact: Artifact, seen: set[str], depth: int) -> Node:
        users = self._used.get(artifact.digest, ())
        if artifact.id in seen and users:
            return self._node(role, artifact, repeated=True)
        if depth == 0 and users:
            return self._node(role, artifact, note=f"goes on: posttrain lineage {artifact.id}")
        seen.add(artifact.id)
        made = {(output.id, name): output for record, name in users for output in record.outputs.values()}
        # a stage may have written the bytes that it had read
        below = [self._up(name, output, seen, depth - 1) for (_, name), output in made.items() if output != artifact]
        return self._node(role, artifact, below=tuple(below))

    def _node(self, role: str, artifact: Artifact, **fields: Any) -> Node:
        record = self.record_of(artifact)
        known: dict[str, Any] = {}
        if record is not None:
            known = {
                "uses": record.stage,
                "stage": str(record.provenance.get("stage_name", "")),
                "run": str(record.provenance.get("run", "")),
                "metrics": self._main_metric(artifact, record),
            }
        return Node(role, artifact.id, artifact.kind, self._names.get(artifact, ""), **known, **fields)

    def _main_metric(self, artifact: Artifact, record: Record) -> dict[str, Any]:
        """A stage's metrics are of all its outputs together, so a dataset says itself how many rows it has."""
        if artifact.kind == "dataset":
            rows = self._described(artifact).get("rows")
            return {} if rows is None else {"rows": rows}
        main = registry.load_stage(record.stage).headline(record.metrics)
        return {} if main is None else {main: record.metrics[main]}

    def _described(self, dataset: Artifact) -> Mapping[str, Any]:
        if dataset not in self._descriptions:
            self._descriptions[dataset] = self.reader.json(dataset, "dataset.json", "dataset")
        return self._descriptions[dataset]

    def sources(self, dataset: Artifact) -> Iterator[Mapping[str, Any]]:
        """The files that a dataset was read from: `file` as the recipe has it, `sha256`, `rows`."""
        described = self._described(dataset).get("source")
        parts = described.get("parts") if isinstance(described, Mapping) else None
        written = self._written_source(dataset)
        for part in parts if isinstance(parts, list) else ():
            if not isinstance(part, Mapping):
                continue
            name = str(part.get("name") or "")
            folder = written.split("*", 1)[0].rstrip("/")
            file = f"{folder}/{name}" if folder and name else written or name
            yield {"file": file, "sha256": str(part.get("sha256") or ""), "rows": part.get("rows")}

    def _written_source(self, dataset: Artifact) -> str:
        """How the recipe names the source: manifests hold no path. Empty where neither record nor run tells."""
        for record in self._made.get(dataset.digest, ()):
            run, stage = record.provenance.get("run"), record.provenance.get("stage_name")
            written = record.provenance.get("source") or named(self._settings(str(run)).get(str(stage), {}).get("with"))
            if written:
                return str(written)
        return ""

    def _settings(self, run: str) -> Mapping[str, Any]:
        if run not in self._runs:
            try:
                self._runs[run] = read_wiring({"stages": {}, **self.store.read_run(run)}).settings
            except PosttrainError:  # the run is gone, or was never kept: names are missing then, nothing else
                self._runs[run] = {}
        return self._runs[run]

    @cached_property
    def _records(self) -> list[Record]:
        return [record for stage in registry.STAGES for record in self.store.stage_records(stage)]

    @cached_property
    def _made(self) -> dict[str, list[Record]]:
        """Digest -> records that wrote it, those last that had read it too: a `gate` hands on what others made."""
        made: dict[str, list[Record]] = {}
        handed_on: dict[str, list[Record]] = {}
        for record in reversed(self._records):
            read = {digest for _, digest in _read(record)}
            for output in record.outputs.values():
                (handed_on if output.digest in read else made).setdefault(output.digest, []).append(record)
        return {digest: [*made.get(digest, ()), *handed_on.get(digest, ())] for digest in {**made, **handed_on}}

    @cached_property
    def _used(self) -> dict[str, list[tuple[Record, str]]]:
        """Digest -> records that read it, each with the name of the input."""
        found: dict[str, list[tuple[Record, str]]] = {}
        for record in reversed(self._records):
            for name, digest in _read(record):
                found.setdefault(digest, []).append((record, name))
        return found

    @cached_property
    def _names(self) -> dict[Artifact, str]:
        """Artifact -> its shortest alias."""
        found: dict[Artifact, str] = {}
        for name, artifact in self.store.aliases().items():
            if artifact not in found or len(name) < len(found[artifact]):
                found[artifact] = name
        return found


def _read(record: Record) -> Iterator[tuple[str, str]]:
    """(input, digest) of all that a stage read."""
    for name, digests in record.identity.get("inputs", {}).items():
        for digest in digests if isinstance(digests, list) else [digests]:
            yield name, str(digest)
