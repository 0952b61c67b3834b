"""`posttrain reproduce`: what made an artifact is run again from its manifest, apart from the store, and compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from artifacts import Artifact, Manifest, Record, Store, open_store
from artifacts.digest import is_sha256
from artifacts.errors import RequestError
from flows.changes import leaves
from flows.command import default_threads
from flows.fields import found as named
from flows.file_differences import differing_files
from flows.found_files import find_folder, with_references
from flows.found_remote import Fetched
from flows.launch import run_stage_process
from flows.launch_settings import Launch, merge_launch
from flows.reporting.reading import artifact_of
from flows.stage_result import Event, StageResult
from stages.identity import fingerprint, with_operational
from stages.stage import STAGES, Stage, load_stage
from stages.usage import machine_facts

Start = Callable[[dict[str, Any], Launch], StageResult]

PLACES = ("devices", "urls", "weights_folder")
"""Operational settings that are of the place where a stage ran."""


@dataclass(frozen=True)
class Reproduction:
    """What came of it. `files`: path -> how it differs. The others: (what, then, now)."""

    artifact: Artifact
    made: Artifact
    stage: str
    files: Mapping[str, str]
    metrics: tuple[tuple[str, Any, Any], ...]
    surroundings: tuple[tuple[str, Any, Any], ...]
    folder: Path

    @property
    def same(self) -> bool:
        """Bit for bit."""
        return self.artifact == self.made

    def to_json(self) -> dict[str, Any]:
        """For `posttrain reproduce --json`."""

        def rows(found: tuple[tuple[str, Any, Any], ...]) -> list[dict[str, Any]]:
            return [{"name": name, "then": then, "now": now} for name, then, now in found]

        return {
            "id": self.artifact.id,
            "made": self.made.id,
            "same": self.same,
            "stage": self.stage,
            "files": dict(self.files),
            "metrics": rows(self.metrics),
            "surroundings": rows(self.surroundings),
            "folder": str(self.folder),
        }


def reproduce(
    store: Store,
    artifact: Artifact,
    folder: Path,
    *,
    files: Sequence[Path | str] = (),
    on_event: Callable[[Event], None] = lambda event: None,
    start: Start | None = None,
) -> Reproduction:
    """Run the stage in `folder`, with a store of its own there; inputs come from `store`, files by content from below
    `files`, folders and URLs. Raises RequestError for what no stage made or what is not at hand, StageFailed where the
    stage fails."""
    job = _Job(store, artifact, files, folder / "fetched")
    spec = job.spec(folder)
    run = start or (lambda spec, launch: run_stage_process(spec, launch, on_event))
    result = run(spec, job.launch)
    scratch = open_store(spec["store"])
    made = scratch.manifest(_counterpart(scratch, job, result))
    return Reproduction(
        artifact=artifact,
        made=made.artifact,
        stage=job.stage.name,
        files={} if made.artifact == artifact else differing_files(store, job.manifest, scratch, made),
        metrics=tuple(_differences(job.manifest.metrics, made.metrics)),
        surroundings=tuple(job.surroundings(made)),
        folder=folder,
    )


class _Job:
    """What the manifest says of how the artifact was made, and what the record remembers besides, if there is one."""

    def __init__(self, store: Store, artifact: Artifact, files: Sequence[Path | str], scratch: Path) -> None:
        self.store, self.artifact = store, artifact
        self.files = [file for file in files if isinstance(file, Path)]
        self.fetched = Fetched([file for file in files if isinstance(file, str)], scratch)
        self.manifest = store.manifest(artifact)
        producer = self.manifest.producer
        if producer.get("stage") not in STAGES:
            raise RequestError(
                f"{artifact.id} was made by no stage of this posttrain, but by {producer.get('stage')!r}: there is "
                "nothing to run again"
            )
        self.stage: Stage = load_stage(producer["stage"])
        self.identity = {key: producer[key] for key in ("stage", "version", "config", "inputs")}
        self.fingerprint = fingerprint(self.identity)
        self.record = self._record()
        provenance = {} if self.record is None else self.record.provenance
        self.provenance: Mapping[str, Any] = provenance
        common = {"processes": provenance.get("processes") or 1, "config": provenance.get("launcher")}
        self.launch = merge_launch(common, {"threads": provenance.get("threads")}, self.stage.single)
        self.hints = self._hints()

    def spec(self, folder: Path) -> dict[str, Any]:
        """As the stage's process takes it."""
        return {
            "stage": self.stage.name,
            "name": str(self.provenance.get("stage_name") or self.stage.name),
            "config": self._config(),
            "inputs": {name: self._input(name, value) for name, value in self.identity["inputs"].items()},
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "store": str(folder.absolute() / "store"),
            "inputs_store": self.store.url,
            "run": "reproduce",
            "recipe": str(self.provenance.get("recipe") or "reproduce"),
            "job": str(folder.absolute() / self.stage.name),
            "processes": self.launch.processes,
            "threads": self.launch.threads or default_threads(self.launch.processes, 1),
            "launcher": self.launch.config,
            "source": str(self.provenance.get("source") or ""),
        }

    def surroundings(self, made: Manifest) -> list[tuple[str, Any, Any]]:
        """What is not as it was: the stage's version, libraries, machine, and threads where they are known."""
        then: dict[str, Any] = {"stage version": self.identity["version"], **self.manifest.versions}
        now: dict[str, Any] = {"stage version": self.stage.version, **made.versions}
        if machine := self.provenance.get("machine"):
            then |= {f"machine {name}": value for name, value in machine.items()}
            now |= {f"machine {name}": value for name, value in machine_facts().items()}
        return _differences(then, now)

    def _record(self) -> Record | None:
        for record in self.store.records(self.stage.name, self.fingerprint):
            if self.artifact in record.outputs.values():
                return record
        return None

    def _hints(self) -> Mapping[str, Any]:
        """The spec of the run that made it, where it ran on this machine: its paths may still lead somewhere."""
        run, name = self.provenance.get("run"), self.provenance.get("stage_name")
        try:
            spec = json.loads((self.store.scratch / str(run) / str(name) / "spec.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return spec if isinstance(spec, dict) else {}

    def _config(self) -> dict[str, Any]:
        hints = self.hints.get("config") or {}
        values = with_references(self.stage.config, self.identity["config"], hints, self.files, self.fetched)
        operational = _anywhere(self.provenance.get("operational") or {})
        try:
            checked = self.stage.config.model_validate(with_operational(values, operational))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise RequestError(
                f"version {self.identity['version']} of {self.stage.name} made {self.artifact.id}; version "
                f"{self.stage.version} does not take its configuration: with.{place}: {first['msg']}; use posttrain "
                f"{self.manifest.versions.get('posttrain')}"
            ) from error
        return checked.model_dump(mode="json")

    def _input(self, name: str, digest: str | list[str]) -> Any:
        if isinstance(digest, list):
            hints = (self.hints.get("inputs") or {}).get(name) or [None] * len(digest)
            return [self._one(name, entry, hint) for entry, hint in zip(digest, hints, strict=True)]
        return self._one(name, digest, (self.hints.get("inputs") or {}).get(name))

    def _one(self, name: str, digest: str, hint: Mapping[str, Any] | None) -> dict[str, str]:
        kinds = self.stage.inputs[name].kinds
        if digest.startswith("hub:"):
            hub, _, revision = digest.removeprefix("hub:").rpartition("@")
            return {"hub": hub, "revision": revision, "kind": kinds[0], "digest": digest}
        bare = digest.removeprefix("sha256:")
        if not is_sha256(bare):
            raise RequestError(f"input {name}: {named(digest)} is no digest")
        for found in self.store.artifacts(bare):
            if found.kind in kinds:
                return {"artifact": found.id, "kind": found.kind}
        try:
            folder = find_folder(bare, (hint or {}).get("path"), self.files, self.fetched)
        except RequestError as error:
            raise RequestError(f"input {name} is neither in {self.store.url} nor at hand: {error}") from error
        return {"path": str(folder), "kind": kinds[0], "digest": bare}


def _anywhere(operational: Any) -> Any:
    """Without what names places and machines, which may be gone: servers of one's own serve as well."""
    if not isinstance(operational, dict):
        return operational
    return {name: _anywhere(value) for name, value in operational.items() if name not in PLACES}


def _counterpart(scratch: Store, job: _Job, result: StageResult) -> Artifact:
    """The output that the artifact was: of equal content, or by the record's word, or most like it."""
    outputs = {name: artifact_of(output) for name, output in result.outputs.items()}
    if job.artifact in outputs.values():
        return job.artifact
    recorded = {} if job.record is None else job.record.outputs
    for name, output in outputs.items():
        if recorded.get(name) == job.artifact:
            return output
    known = {(file.path, file.sha256) for file in job.manifest.files}

    def likeness(artifact: Artifact) -> int:
        return sum((file.path, file.sha256) in known for file in scratch.manifest(artifact).files)

    of_kind = [output for output in outputs.values() if output.kind == job.artifact.kind]
    if not of_kind:
        raise RequestError(f"{job.stage.name} made no {job.artifact.kind} this time")
    return max(of_kind, key=likeness)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    before, after = dict(leaves(then)), dict(leaves(now))
    names = [name for name in dict.fromkeys([*before, *after]) if name]
    return [(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)]
