"""Bounded, forgiving reading of artifacts: what cannot be read becomes a note on the page, not an error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import IO, Any

from artifacts import Artifact, FileEntry, Manifest, Store
from artifacts.contents import PAYLOAD
from artifacts.errors import DamagedError, PosttrainError
from flows.reporting.text import short

MAX_FILE_BYTES = 2**28
"""A larger file of metrics or samples is named, not read."""
TRAINED = ("model", "adapter", "reward_model", "process_reward_model")
"""Kinds of what training stages make."""
MAX_LINE_BYTES = 8 * 2**20
"""A longer line of a JSONL file is named and skipped."""


def artifact_of(output: Mapping[str, Any]) -> Artifact:
    """The artifact that one entry of a run's `outputs` names."""
    return Artifact(kind=str(output["kind"]), digest=str(output["id"]).removeprefix("sha256:"))


@dataclass
class Reader:
    """Reads files of artifacts for one section of the page; `notes` says what could not be read."""

    store: Store
    notes: list[str] = field(default_factory=list)

    def manifest(self, artifact: Artifact, label: str) -> Manifest | None:
        """The manifest, or None with a note."""
        try:
            return self.store.manifest(artifact)
        except PosttrainError as error:
            self.note(f"{label}: {artifact.kind} {short(artifact.id)} cannot be read: {error}")
            return None

    def json(self, artifact: Artifact, name: str, label: str, *, expected: bool = False) -> dict[str, Any]:
        """A JSON object of an artifact; empty when it has none (noted where it is expected)."""
        with self._opened(artifact, name, label, expected=expected) as file:
            if file is None:
                return {}
            try:
                value = json.loads(file.read())
            except ValueError as error:
                self.note(f"{label}: {name} is not JSON: {error}")
                return {}
        if not isinstance(value, dict):
            self.note(f"{label}: {name} is not a JSON object")
            return {}
        return value

    def lines(self, artifact: Artifact, name: str, label: str, limit: int) -> Iterator[dict[str, Any]]:
        """The JSON objects in the first `limit` lines of a JSONL file; bad lines are noted and skipped."""
        with self._opened(artifact, name, label) as file:
            if file is not None:
                yield from self.objects(file, name, label, limit)

    def objects(self, file: IO[bytes], name: str, label: str, limit: int) -> Iterator[dict[str, Any]]:
        """`lines` of a file that is open."""
        for number in range(1, limit + 1):
            line = file.readline(MAX_LINE_BYTES)
            if not line:
                return
            value = self._parsed(line, f"{label}: {name} line {number}")
            if value is not None:
                yield value
        if file.read(1):
            self.note(f"{label}: only the first {limit:,} lines of {name} were read")

    @contextmanager
    def _opened(
        self, artifact: Artifact, name: str, label: str, *, expected: bool = False
    ) -> Iterator[IO[bytes] | None]:
        """One file of an artifact, checked against its manifest; the others (weights) stay where they are."""
        manifest = self.manifest(artifact, label)
        entry = None if manifest is None else next((e for e in manifest.files if e.path == name), None)
        where = f"{artifact.kind} {short(artifact.id)}"
        if entry is None:
            if expected and manifest is not None:
                self.note(f"{label}: {where} has no {name}")
            yield None
        elif entry.size > MAX_FILE_BYTES:
            self.note(f"{label}: {name} of {where} is too large for a report ({entry.size:,} bytes)")
            yield None
        else:
            with TemporaryFile() as file:
                try:
                    self._fetch(artifact, entry, file)
                except (PosttrainError, OSError) as error:
                    self.note(f"{label}: {name} of {where} cannot be read: {error}")
                    yield None
                else:
                    file.seek(0)
                    yield file

    def _fetch(self, artifact: Artifact, entry: FileEntry, file: IO[bytes]) -> None:
        sha256 = hashlib.sha256()
        for piece in self.store.files.stream(f"{artifact.key}/{PAYLOAD}/{entry.path}", entry.size):
            sha256.update(piece)
            file.write(piece)
        if sha256.hexdigest() != entry.sha256:
            raise DamagedError("its content is not what was stored; `posttrain verify` says more")

    def note(self, text: str) -> None:
        """Says it once."""
        if text not in self.notes:
            self.notes.append(text)

    def _parsed(self, line: bytes, where: str) -> dict[str, Any] | None:
        try:
            value = json.loads(line)
        except ValueError:
            self.note(f"{where} is not JSON and was left out")
            return None
        if not isinstance(value, dict):
            self.note(f"{where} is not a JSON object and was left out")
            return None
        return value
