"""What can be wired into a stage: outputs of other stages, artifacts of the store, folders, Hub models."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.errors import RequestError
from stages.hub import hub_revision
from stages.hub_cache import MAIN, noted

if TYPE_CHECKING:
    from artifacts import Artifact, Store
    from stages.outside import Outside

FOLDER_KINDS = {
    "dataset.json": ("dataset",),
    "adapter_config.json": ("adapter",),
    "config.json": ("model", "reward_model"),
}
"""The file that tells what a folder is -> the kinds it can be."""

HUB_KINDS = ("model", "reward_model")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class StageOutput:
    """An output of another stage of the recipe."""

    stage: str
    output: str

    def __str__(self) -> str:
        return f"{self.stage}.{self.output}"


@dataclass(frozen=True)
class Stored:
    """An artifact of the store, by alias or id."""

    name: str

    def __str__(self) -> str:
        return f"@{self.name}"


@dataclass(frozen=True)
class Folder:
    """A folder on this machine."""

    path: Path
    written: str

    def __str__(self) -> str:
        return self.written


@dataclass(frozen=True)
class HubModel:
    """A model of the Hugging Face Hub, at a commit or at its newest."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


Reference = StageOutput | Stored | Folder | HubModel
External = Stored | Folder | HubModel


@dataclass(frozen=True)
class Wanted:
    """Something outside of the recipe that one of its stages reads."""

    stage: str
    place: tuple[str | int, ...]
    """Where the recipe says so."""
    reference: External
    kinds: tuple[str, ...]
    """What is taken there; none: not known, since the stage is of no known kind."""


def parse_external(text: str, base: Path) -> External | None:
    """`@alias`, `@sha256:...`, a path or `owner/name`; None: the text is none of these."""
    if text.startswith("@"):
        return Stored(text[1:])
    if text.startswith(("./", "../", "/", "~")):
        path = Path(os.path.expanduser(text))
        return Folder(path if path.is_absolute() else base / path, text)
    if _HUB_NAME.fullmatch(text):
        name, _, revision = text.partition("@")
        return HubModel(name, revision or None)
    return None


def folder_kinds(path: Path) -> tuple[str, ...]:
    """The kinds of artifact that a folder can stand for. Raises RequestError when it is none."""
    if not os.path.isdir(path):  # whatever its characters and length
        raise RequestError(f"no such folder: {path}")
    for marker, kinds in FOLDER_KINDS.items():
        if (path / marker).is_file():
            return (_model_kind(path / marker),) if "model" in kinds else kinds
    raise RequestError(
        f"{path} is neither a model (it has no config.json), nor an adapter (no adapter_config.json), nor a dataset "
        "(no dataset.json)"
    )


def _model_kind(config: Path) -> str:
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        names = [str(name) for name in values.get("architectures") or ()]
    except (OSError, ValueError, AttributeError) as error:
        raise RequestError(f"{config} is not a model's configuration: {error}") from error
    return "reward_model" if any(name.endswith("ForSequenceClassification") for name in names) else "model"


@dataclass(frozen=True)
class ResolvedInput:
    """One artifact that a stage will read, with the digest that counts for its fingerprint."""

    kind: str
    digest: str
    artifact: Artifact | None = None
    path: Path | None = None
    hub: str | None = None
    revision: str | None = None
    written: str | None = None
    """The path as the recipe has it: records hold no path of a machine."""
    branch: str | None = None
    """The branch of the Hub that the commit was found at; None: the recipe names the commit."""
    notes: tuple[str, ...] = ()
    """What people are to know of how it was found."""

    @classmethod
    def of(cls, artifact: Artifact) -> ResolvedInput:
        return cls(artifact.kind, artifact.digest, artifact=artifact)

    @property
    def label(self) -> str:
        """What people call it: an id, a path as written or a Hub name with its commit."""
        if self.artifact is not None:
            return self.artifact.id
        return str(self.written) if self.path is not None else f"{self.hub}@{self.revision}"

    def spec(self) -> dict[str, str]:
        """As `spec.json` holds it."""
        if self.artifact is not None:
            return {"artifact": self.artifact.id, "kind": self.kind}
        if self.path is not None:
            return {"path": str(self.path), "kind": self.kind, "digest": self.digest}
        return {
            "hub": str(self.hub),
            "revision": str(self.revision),
            "kind": self.kind,
            "digest": self.digest,
            **({} if self.branch is None else {"branch": self.branch}),
        }


def resolve_external(reference: External, accepted: tuple[str, ...], store: Store, outside: Outside) -> ResolvedInput:
    """What a reference means now. Raises RequestError when it is not there or of a kind not accepted (none named: of
    any)."""
    if isinstance(reference, Stored):
        found = ResolvedInput.of(store.find(str(reference), accepted))
    elif isinstance(reference, Folder):
        kind = folder_kinds(reference.path)[0]
        path = reference.path.resolve()
        digest = outside.content("folder", str(path))
        found = ResolvedInput(kind, digest, path=path, written=reference.written)
    else:
        found = _resolve_hub(reference, accepted)
    if accepted and found.kind not in accepted:
        raise RequestError(f"takes {kinds_in_words(accepted)}, but {reference} is a {found.kind}")
    return found


def _resolve_hub(reference: HubModel, accepted: tuple[str, ...]) -> ResolvedInput:
    with noted() as notes:
        revision = reference.revision or hub_revision(reference.name, "model")
    if not _COMMIT.fullmatch(revision):
        raise RequestError(f"{reference}: give the full commit (40 hexadecimal digits) or leave the revision out")
    kind = next((kind for kind in accepted if kind in HUB_KINDS), "model")
    # a commit fixes the content as well as a digest of the files would, without fetching them
    digest, branch = f"hub:{reference.name}@{revision}", MAIN if reference.revision is None else None
    return ResolvedInput(kind, digest, hub=reference.name, revision=revision, branch=branch, notes=tuple(notes))


def kinds_in_words(kinds: tuple[str, ...]) -> str:
    """`a model or a reward_model`"""
    return " or ".join(f"an {kind}" if kind[0] in "aeiou" else f"a {kind}" for kind in kinds)


def input_digests(inputs: Mapping[str, tuple[ResolvedInput, ...]], many: Mapping[str, bool]) -> dict[str, Any]:
    """Digests as the identity of a stage takes them: one, or a list where the stage takes several."""
    return {
        name: [entry.digest for entry in entries] if many[name] else entries[0].digest
        for name, entries in inputs.items()
    }


def input_specs(inputs: Mapping[str, tuple[ResolvedInput, ...]], many: Mapping[str, bool]) -> dict[str, Any]:
    """Inputs as `spec.json` takes them."""
    return {
        name: [entry.spec() for entry in entries] if many[name] else entries[0].spec()
        for name, entries in inputs.items()
    }
