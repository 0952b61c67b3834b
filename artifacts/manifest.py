"""Artifacts and their manifests."""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from artifacts.digest import FileEntry, collisions, digest_of, is_sha256, path_problem
from artifacts.errors import DamagedError, RequestError
from artifacts.sealed import seal, unseal
from artifacts.shapes import mapping, origin

FORMAT = 1
NAMED_LIBRARIES = (
    "posttrain",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "vllm",
)
KIND = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class Artifact:
    """A reference: what it is and the digest of its content (64 hex digits)."""

    kind: str
    digest: str

    def __post_init__(self) -> None:
        if not KIND.fullmatch(self.kind) or not is_sha256(self.digest):
            raise RequestError(f"not an artifact: kind {self.kind!r}, digest {self.digest!r}")

    @property
    def id(self) -> str:
        """`sha256:<digest>`."""
        return f"sha256:{self.digest}"

    @property
    def key(self) -> str:
        """Its folder in the store."""
        return f"artifacts/{self.kind}/{self.digest}"

    @classmethod
    def of(cls, kind: str, identifier: str) -> Artifact:
        """From its id, with or without `sha256:`. Raises RequestError."""
        return cls(kind, identifier.removeprefix("sha256:"))

    def to_json(self) -> dict[str, str]:
        return {"kind": self.kind, "id": self.id}

    @classmethod
    def from_json(cls, value: Any) -> Artifact:
        """Raises RequestError for anything but what `to_json` gives."""
        kind, digest = (value.get(name) if isinstance(value, dict) else None for name in ("kind", "id"))
        if not isinstance(kind, str) or not isinstance(digest, str):
            raise RequestError(f"not an artifact: {str(value)[:80]!r}")
        return cls.of(kind, digest)

    def __str__(self) -> str:
        return f"{self.kind} {self.id[:19]}"


@dataclass(frozen=True)
class Manifest:
    """What an artifact holds and how it was made. Written last: what has no manifest does not exist."""

    kind: str
    files: tuple[FileEntry, ...]
    producer: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    """Digests of artifacts that it cannot be used without, besides those that it was made from."""

    @property
    def digest(self) -> str:
        return digest_of(self.files)

    @property
    def artifact(self) -> Artifact:
        return Artifact(self.kind, self.digest)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)

    def to_bytes(self) -> bytes:
        """The manifest file."""
        rows = [{"path": entry.path, "size": entry.size, "sha256": entry.sha256} for entry in self.files]
        return seal(
            {
                "format": FORMAT,
                "kind": self.kind,
                "id": self.artifact.id,
                "files": rows,
                "producer": self.producer,
                "metrics": self.metrics,
                "counts": self.counts,
                "versions": self.versions,
                **({"needs": [f"sha256:{digest}" for digest in self.needs]} if self.needs else {}),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, artifact: Artifact, where: str) -> Manifest:
        """Raises DamagedError unless it is the whole manifest of just that artifact, with harmless paths."""
        value = unseal(data, where)
        try:
            if value["format"] != FORMAT:
                raise DamagedError(f"{where} has format {value['format']!r}; this posttrain reads {FORMAT}")
            files = tuple(FileEntry(row["path"], row["size"], row["sha256"]) for row in value["files"])
            manifest = cls(
                kind=value["kind"],
                files=files,
                producer=origin(value, "producer"),
                needs=tuple(_digest(text) for text in value.get("needs", ())),
                **{name: mapping(value, name) for name in ("metrics", "counts", "versions")},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{where} is not a manifest: {type(error).__name__}: {error}") from None
        problems = file_list_problems(files)
        if problems:
            raise DamagedError(f"{where} lists what no artifact may hold: {'; '.join(problems[:3])}")
        if (manifest.kind, manifest.digest) != (artifact.kind, artifact.digest):
            other = f"{str(manifest.kind)[:80]!r} sha256:{manifest.digest[:12]}"
            raise DamagedError(f"{where} is the manifest of {other}, not of {artifact}")
        return manifest


def _digest(text: Any) -> str:
    digest = str(text).removeprefix("sha256:")
    if not is_sha256(digest):
        raise ValueError(f"needs names no artifact: {str(text)[:80]!r}")
    return digest


def file_list_problems(files: tuple[FileEntry, ...]) -> list[str]:
    """What is wrong with a list of files that came from outside; empty when all is well."""
    problems = []
    for entry in files:
        reason = path_problem(entry.path)
        if reason is not None:
            problems.append(f"{entry.path!r}: {reason}")
        elif type(entry.size) is not int or not 0 <= entry.size < 2**63 or not is_sha256(entry.sha256):
            problems.append(f"{entry.path!r}: size {str(entry.size)[:40]} or sha256 {str(entry.sha256)[:80]!r} is none")
    if not files:
        problems.append("no file")
    if problems:
        return problems
    if list(files) != sorted(files) or len({entry.path for entry in files}) != len(files):
        problems.append("the files are not in order, or one is there twice")
    return problems + collisions(entry.path for entry in files)


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that decide numbers; nothing is imported."""
    # slow to import, and only needed where something is stored
    import importlib.metadata

    versions = {"python": platform.python_version()}
    for name in NAMED_LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
