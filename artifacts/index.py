"""The index: append-only records of which stage, under which fingerprint, gave which artifacts."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from artifacts.digest import canonical_json, is_sha256, sha256_bytes
from artifacts.errors import DamagedError, RequestError
from artifacts.files import Files
from artifacts.folder import in_parallel
from artifacts.manifest import Artifact
from artifacts.reading import read_sealed
from artifacts.sealed import seal, unseal
from artifacts.shapes import mapping, origin

logger = logging.getLogger(__name__)
STAGE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
NAME = re.compile(r"\d{20}-[0-9a-f]{12}\.json")
THREADS = 8


@dataclass(frozen=True)
class Record:
    """One finished run of a stage. `identity` is what was hashed into the fingerprint, readable."""

    stage: str
    fingerprint: str
    identity: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Artifact] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        names = ("stage", "fingerprint", "identity", "metrics", "counts", "timings", "provenance")
        outputs = {name: artifact.to_json() for name, artifact in self.outputs.items()}
        return seal({"format": 1, "outputs": outputs, **{name: getattr(self, name) for name in names}})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Record:
        """Raises DamagedError."""
        value = unseal(data, where)
        try:
            outputs = {name: Artifact.from_json(item) for name, item in mapping(value, "outputs").items()}
            return cls(
                stage=value["stage"],
                fingerprint=value["fingerprint"],
                identity=origin(value, "identity"),
                outputs=outputs,
                **{name: mapping(value, name) for name in ("metrics", "counts", "timings", "provenance")},
            )
        except (KeyError, TypeError, RequestError) as error:
            raise DamagedError(f"{where} is not a record: {type(error).__name__}: {error}") from None


def append(files: Files, record: Record) -> str:
    """Adds a record and returns its key. The time in its name only orders records; two writers at one instant
    leave two records."""
    folder = f"{_folder(record.stage)}/{_checked(record.fingerprint)}"
    key = f"{folder}/{time.time_ns():020d}-{os.urandom(6).hex()}.json"
    files.write(key, record.to_bytes())
    return key


def records(files: Files, stage: str, fingerprint: str) -> list[Record]:
    """Records of one fingerprint, newest first. Damaged ones are named in the log and left out."""
    folder = f"{_folder(stage)}/{_checked(fingerprint)}"
    return _read(files, [f"{folder}/{name}" for name in files.children(folder)], stage)


def stage_records(files: Files, stage: str, newest: int | None = None) -> list[Record]:
    """Records of every fingerprint of a stage, or of so many that had one last, newest first."""
    folder = _folder(stage)
    if newest is None:
        return _read(files, [f"{folder}/{path}" for path in files.tree(folder)], stage)
    changed = files.changed(folder)
    last = sorted(changed, key=lambda fingerprint: (changed[fingerprint], fingerprint), reverse=True)[:newest]
    keys = [
        f"{folder}/{name}/{record}" for name in last if is_sha256(name) for record in files.children(f"{folder}/{name}")
    ]
    return _read(files, keys, stage)


def every_record(files: Files) -> dict[str, Record]:
    """Key -> record, of every stage. Damaged ones are named in the log and left out."""
    stages = [name for name in files.children("index") if STAGE.fullmatch(name)]
    keys = [f"index/{stage}/{path}" for stage in stages for path in files.tree(f"index/{stage}") if _is_place(path)]
    found = in_parallel(lambda key: _read_one(files, key, key.split("/")[1]), keys, THREADS)
    return {key: record for key, record in zip(keys, found, strict=True) if record is not None}


def _is_place(path: str) -> bool:
    """Whether it is `<fingerprint>/<time>-<random>.json`."""
    fingerprint, _, name = path.partition("/")
    return is_sha256(fingerprint) and bool(NAME.fullmatch(name))


def fingerprint_of(producer: Mapping[str, Any]) -> str:
    """Under which the work of a manifest's producer was recorded: what a manifest names is the identity."""
    return sha256_bytes(canonical_json(producer))


def _read(files: Files, keys: list[str], stage: str) -> list[Record]:
    newest_first = sorted(keys, key=lambda key: key.rsplit("/", 1)[-1], reverse=True)
    found = in_parallel(lambda key: _read_one(files, key, stage), newest_first, THREADS)
    return [record for record in found if record is not None]


def _read_one(files: Files, key: str, stage: str) -> Record | None:
    try:
        record = Record.from_bytes(read_sealed(files, key), f"{files.url}/{key}")
    except FileNotFoundError:
        # deleted since it was listed
        return None
    except DamagedError as error:
        logger.warning("%s; it is not counted", error)
        return None
    if (record.stage, record.fingerprint) != (stage, key.split("/")[-2]):
        logger.warning("%s/%s is a record of another fingerprint; it is not counted", files.url, key)
        return None
    return record


def _folder(stage: str) -> str:
    if not STAGE.fullmatch(stage):
        raise RequestError(f"not the name of a stage: {stage!r}")
    return f"index/{stage}"


def _checked(fingerprint: str) -> str:
    if not is_sha256(fingerprint):
        raise RequestError(f"not a fingerprint (64 hex digits): {fingerprint!r}")
    return fingerprint
