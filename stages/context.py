"""What a running stage sees: its configuration, its inputs as folders, fresh output folders, and a way to report.

Nothing here knows Prefect: progress goes to `events.jsonl` in the job folder, which whoever started us reads.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from artifacts import Artifact, Checkpoints, Shards, Store, open_store
from artifacts.errors import StageError
from stages.held import Held, planned_outside
from stages.hub import hub_folder
from stages.identity import fingerprint, identity
from stages.spec import Spec
from stages.stage import Config, Stage, load_stage

FAILED_LINE = "the stage failed, and this is where:"
"""In its output, before the traceback: whoever started us has the error from `error.json`, and shows it once."""

_SECONDS_BETWEEN_EVENTS = 0.5


class Context:
    """The world of one stage run. Every process of a distributed stage has its own; rank 0 reports and writes."""

    def __init__(self, spec: Spec, store: Store, *, rank: int = 0) -> None:
        self.spec = spec
        self.store = store
        self._inputs_store = store if spec.inputs_store is None else open_store(spec.inputs_store)
        self.stage: Stage = load_stage(spec.stage)
        self.config: Any = self.stage.config.model_validate_json(json.dumps(spec.config))
        self.rank = rank
        self.held = Held(
            planned_outside(self.config, spec.identity, spec.inputs), spec.outside, self.scratch / "expected.json"
        )
        """What the stage reads from outside the store."""
        self.metrics: dict[str, Any] = {}
        self.timings: dict[str, Any] = {}
        self.counts: dict[str, Any] = {}
        self.needs: list[Artifact] = []
        """What the outputs cannot be used without, besides the inputs."""
        self.handed_on: dict[str, Artifact] = {}
        """Outputs that are artifacts of the store already."""
        self.tokens = 0
        """Put through models by this run of the stage, read or written; for the ledger."""
        self.resumed_from: int | None = None
        self._folders: dict[str, list[Path]] = {}
        self._checked: dict[Artifact, Path] = {}
        self._last_event_time = 0.0
        self.resources = ExitStack()
        """What the stage has opened that outlives a call: closed when it ends, however it ends."""
        self.step_timings: list[dict[str, Any]] = []
        """One row a step for `timings.jsonl`, kept outside the artifact: its content knows no clock."""

    @property
    def processes(self) -> int:
        """Number of processes that run this stage together."""
        return self.spec.processes

    @property
    def is_main(self) -> bool:
        """Whether this is the process that reports and writes."""
        return self.rank == 0

    @property
    def threads(self) -> int | None:
        """CPU threads of each process; None: as the library chooses."""
        return self.spec.threads

    @property
    def fingerprint(self) -> str:
        """Names the work: checkpoints and shards of equal fingerprints can be taken up."""
        return self.spec.fingerprint

    @property
    def checkpoints(self) -> Checkpoints:
        """Saved training states of this fingerprint."""
        return self.store.checkpoints(self.fingerprint)

    @cached_property
    def shards(self) -> Shards:
        """Finished pieces of sharded work of this fingerprint; it knows what this process has saved."""
        return self.store.shards(self.fingerprint)

    @property
    def scratch(self) -> Path:
        """A local folder of this run of this process."""
        path = Path(self.spec.job) / f"scratch-{self.rank}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def has(self, name: str) -> bool:
        """Whether an optional input is wired in."""
        return name in self.spec.inputs

    def input(self, name: str) -> Path:
        """The folder with the files of one input, checked against its digest; of one that is a list, `name.2` is the
        third entry."""
        name, _, number = name.partition(".")
        folders = self.inputs_of(name)
        if number:
            return folders[int(number)]
        if len(folders) != 1:
            raise StageError(f"{self.spec.name}: input {name!r} is a list of {len(folders)}; this stage takes one")
        return folders[0]

    def inputs_of(self, name: str) -> list[Path]:
        """The folders of an input that takes several."""
        if name not in self._folders:
            wired = self.spec.inputs[name]
            self._folders[name] = [self.folder_of(entry) for entry in (wired if isinstance(wired, list) else [wired])]
        return self._folders[name]

    def input_digest(self, name: str) -> str:
        """The content digest of one input."""
        return str(self.spec.identity["inputs"][name])

    def producer_of(self, name: str) -> Mapping[str, Any]:
        """What made an input, as its manifest says: stage, version, config, inputs. Raises StageError of a folder."""
        wired = self.spec.inputs[name]
        if "artifact" not in wired:
            raise StageError(f"{self.spec.name}: input {name!r} is a folder, of which nothing says what made it")
        return self._inputs_store.manifest(_artifact(wired)).producer

    def hand_on(self, output: str, name: str) -> None:
        """Output `output` is input `name` as it is: in this store nothing is copied."""
        wired = self.spec.inputs[name]
        if "artifact" in wired and self._inputs_store is self.store:
            self.handed_on[output] = _artifact(wired)
        else:
            shutil.copytree(self.input(name), self.output(output), dirs_exist_ok=True)

    def folder_of(self, wired: Mapping[str, Any]) -> Path:
        """The files of what a spec names: an artifact, checked once, a commit of the Hub, or a path."""
        if "artifact" in wired:
            artifact = _artifact(wired)
            if artifact not in self._checked:
                self._checked[artifact] = self._inputs_store.materialize(artifact)
            return self._checked[artifact]
        if "hub" in wired:
            return hub_folder(wired["hub"], wired["revision"], wired.get("branch"))
        return Path(wired["path"])

    def output(self, name: str) -> Path:
        """A fresh, empty folder for one output."""
        if name not in self.stage.outputs_of(self.config):
            raise KeyError(f"stage {self.stage.name} has no output {name!r} under this configuration")
        path = Path(self.spec.job) / "out" / name
        if self.is_main:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        return path

    def phase(self, text: str) -> None:
        """Say what is going on where there is no count of steps."""
        self._event({"kind": "phase", "text": text})

    def progress(self, step: int, total: int, unit: str = "step", values: Mapping[str, float] | None = None) -> None:
        """Report progress; events less than half a second apart are dropped, the last one never."""
        now = time.monotonic()
        if step < total and now - self._last_event_time < _SECONDS_BETWEEN_EVENTS:
            return
        self._last_event_time = now
        self._event({"kind": "progress", "step": step, "total": total, "unit": unit, "values": values or {}})

    def log(self, text: str) -> None:
        """A line for people: the terminal, the log and Prefect show it."""
        self._event({"kind": "log", "text": text})

    def table(self, name: str, title: str, rows: Sequence[Mapping[str, Any]], text: str) -> None:
        """Rows for people to look at, and the same as lines of text: the log and Prefect show them."""
        self._event({"kind": "table", "name": name, "title": title, "rows": list(rows), "text": f"{title}\n{text}"})

    def micro_batch(self, tokens: int) -> None:
        """Say that a forward pass of so many tokens begins: should memory not suffice, that much was too much."""
        self._event({"kind": "micro_batch", "tokens": tokens})

    def resumed(self, step: int) -> None:
        """Say that earlier work was taken up."""
        self.resumed_from = step
        self._event({"kind": "resumed", "step": step})

    def _event(self, event: dict[str, Any]) -> None:
        if not self.is_main:
            return
        line = json.dumps({"time": time.time(), **event}, default=float) + "\n"
        with open(Path(self.spec.job) / "events.jsonl", "a", encoding="utf-8") as file:
            file.write(line)


def _artifact(wired: Mapping[str, Any]) -> Artifact:
    return Artifact.of(wired["kind"], str(wired["artifact"]))


def local_context(
    stage: str,
    config: Config | dict[str, Any],
    *,
    folder: Path,
    inputs: dict[str, Path | list[Path]] | None = None,
    store: str | None = None,
) -> Context:
    """A context outside any recipe, for notebooks and tests: inputs are plain folders, the store lies in `folder`."""
    from stages.external import folder_digest

    declared = load_stage(stage)
    checked = config if isinstance(config, Config) else declared.config.model_validate(config)
    wired: dict[str, Any] = {}
    digests: dict[str, str | list[str]] = {}
    for name, given in (inputs or {}).items():
        kind = declared.inputs[name].kinds[0]
        entries = [
            {"path": str(path), "kind": kind, "digest": folder_digest(path)}
            for path in (given if isinstance(given, list) else [given])
        ]
        wired[name] = entries if isinstance(given, list) else entries[0]
        digests[name] = [entry["digest"] for entry in entries] if isinstance(given, list) else entries[0]["digest"]
    what = identity(declared, checked, digests)
    job = folder / "job"
    job.mkdir(parents=True, exist_ok=True)
    spec = Spec(
        stage=stage,
        name=stage,
        config=checked.model_dump(mode="json"),
        inputs=wired,
        fingerprint=fingerprint(what),
        identity=what,
        store=store or str(folder / "store"),
        job=str(job),
        threads=int(os.environ.get("OMP_NUM_THREADS", "1")),
    )
    return Context(spec, open_store(spec.store))
