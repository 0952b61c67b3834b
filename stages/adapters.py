"""Adapters as folders in peft's format, and the base that one names: an artifact of the store, or a Hub commit.

Imports no torch: plans read what an adapter is as well.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts import Artifact
from artifacts.digest import digest_of, is_sha256
from artifacts.errors import DamagedError, MissingError, StageError
from artifacts.folder import hash_folder
from stages.context import Context
from stages.disk import require_disk

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on: an artifact's id, or the name of a Hub model with its commit."""

    name: str
    revision: str | None = None

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> Base:
        """From the values of an adapter_config.json. Raises StageError where it names no fixed content."""
        name, revision = values.get("base_model_name_or_path"), values.get("revision")
        if isinstance(name, str) and is_sha256(name.removeprefix("sha256:")):
            return cls(name)
        if isinstance(name, str) and isinstance(revision, str) and _COMMIT.fullmatch(revision):
            return cls(name, revision)
        raise StageError(
            f"{where}: {CONFIG} does not say what model it is of (base_model_name_or_path {name!r}, revision "
            f"{revision!r}); an artifact's id (sha256:...) or a Hub name with its full commit as revision does. Give "
            "the base by hand to a stage `merge_adapter`, as its input base"
        )

    @property
    def artifact(self) -> Artifact | None:
        """Where it is in a store; None: it is on the Hub."""
        return Artifact.of("model", self.name) if self.revision is None else None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


@dataclass(frozen=True)
class ModelSource:
    """Where the model of an input comes from: a folder, and where that is an adapter's, the folder of its base."""

    folder: Path
    """With weights and config.json."""
    adapter: Path | None = None
    base: Base | None = None
    """What the adapter names."""

    @property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer."""
        own = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return self.adapter if own and self.adapter is not None else self.folder


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG).is_file()


def read_adapter_config(content: bytes | str, where: str) -> dict[str, Any]:
    """The values of an adapter_config.json. Raises StageError where they are none."""
    try:
        values = json.loads(content)
    except ValueError as error:
        raise StageError(f"{where}: {CONFIG} is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, dict) else None
        raise StageError(f"{where}: {CONFIG} is of an adapter of type {kind!r}; LoRA and its relatives are supported")
    return values


def model_source(context: Context, name: str) -> ModelSource:
    """Of an input that takes models or adapters; all files are there and checked.

    Raises StageError where the base of an adapter is missing or damaged.
    """
    folder = context.input(name)
    if not is_adapter(folder):
        return ModelSource(folder)
    where = f"input {name}"
    base = Base.read(read_adapter_config((folder / CONFIG).read_bytes(), where), where)
    wired = {"hub": base.name, "revision": base.revision}
    if base.artifact is not None:
        wired = {"artifact": base.artifact.id, "kind": base.artifact.kind}
    try:
        return ModelSource(context.folder_of(wired), folder, base)
    except (MissingError, DamagedError) as error:
        raise StageError(
            f"{where} is an adapter of the model {base}, which cannot be had: {error}. Run the stage that makes that "
            "model again, or take the store that holds it"
        ) from error
    except OSError as error:  # the Hub does not answer, and nothing is in its cache
        raise StageError(
            f"{where} is an adapter of the model {base}, which cannot be fetched: {type(error).__name__}: {error}"
        ) from error


def source_with(context: Context, name: str, base: str) -> ModelSource:
    """Of an adapter, on the base of another input. Raises StageError where the adapter names another model."""
    folder, adapter = context.input(base), context.input(name)
    if not is_adapter(adapter):
        raise StageError(f"input {name} is no adapter: it has no {CONFIG}")
    values = read_adapter_config((adapter / CONFIG).read_bytes(), f"input {name}")
    try:
        named = Base.read(values, f"input {name}")
    except StageError:  # a path of some machine, or nothing: that is what the input is for
        return ModelSource(folder, adapter)
    given = _base_of(context.spec.inputs[base]) or Base(Artifact("model", digest_of(hash_folder(folder))).id)
    if given != named:
        raise StageError(f"input {name} is an adapter of the model {named}, but input {base} is {given}")
    return ModelSource(folder, adapter, named)


def name_for_good(context: Context, name: str) -> Base:
    """What names the model of an input on any machine. A folder is stored as an artifact first: its path names
    nothing."""
    source = model_source(context, name)
    base = source.base or _base_of(context.spec.inputs[name]) or Base(_stored(context, source.folder).id)
    if base.artifact is not None:
        context.needs.append(base.artifact)
    return base


def _base_of(wired: Mapping[str, Any]) -> Base | None:
    """What a spec names for good; None: it is a path."""
    if "artifact" in wired:
        return Base(wired["artifact"])
    return Base(wired["hub"], wired["revision"]) if "hub" in wired else None


def _stored(context: Context, folder: Path) -> Artifact:
    """The artifact with the files of a folder; where the store has it already, nothing is copied."""
    artifact = Artifact("model", digest_of(hash_folder(folder)))
    if context.store.is_intact(artifact):
        return artifact
    context.phase("storing the base of the adapter")
    copy = context.scratch / "base"
    shutil.rmtree(copy, ignore_errors=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    require_disk(context.scratch, size, "the base of the adapter, which is kept with it")
    shutil.copytree(folder, copy)
    producer = {"stage": "base_of_adapter", "version": 1, "config": {}, "inputs": {}}
    try:
        return context.store.put("model", copy, producer=producer)
    finally:
        shutil.rmtree(copy, ignore_errors=True)
