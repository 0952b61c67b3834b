"""Which files of a Hub repository are whose: those of one artifact, and a note of them that stays beside them.

A model repository is one part; a dataset repository has a part for each split. A push replaces its part and nothing
else: it takes away what the push before it made, by that one's note, and what would be read together with the new
files though it is not of them, by its name. Whatever else a person put there stays.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from artifacts.errors import StageError

Kind = Literal["model", "dataset"]
Content = Path | bytes

OURS = ".posttrain"
"""A folder that neither `transformers` nor `datasets` looks into."""
MODEL = "model"
"""The name of a model repository's only part."""

_OF_MODELS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "adapter_model.bin",
)
"""Weights, and what decides whether they are read as a model or an adapter."""
_ONCE_OF_DATASETS = ("data.parquet", "dataset.json")
"""Where version 1 of the stage put rows."""


@dataclass(frozen=True)
class Part:
    """What one push puts into a repository. `files`: by their paths there."""

    kind: Kind
    name: str
    digest: str
    files: Mapping[str, Content]

    @property
    def is_adapter(self) -> bool:
        """Of a model: whether it is an adapter without the model below it."""
        return "adapter_config.json" in self.files

    @property
    def note_path(self) -> str:
        """Where its note lies."""
        return note_path(self.name)


@dataclass(frozen=True)
class Note:
    """What a push left in a repository: for the next one."""

    digest: str
    files: tuple[str, ...]
    readme: str | None = field(default=None)
    """The git hash of the page that it wrote; None: it wrote none."""

    def to_bytes(self) -> bytes:
        """As the repository has it."""
        told = {"artifact": self.digest, "files": sorted(self.files), "readme": self.readme}
        return (json.dumps(told, indent=1) + "\n").encode()

    @classmethod
    def read(cls, data: bytes, where: str) -> Note:
        """Raises StageError where it is none."""
        try:
            told = json.loads(data)
            files = tuple(map(str, told["files"]))
            return cls(str(told["artifact"]), files, None if told["readme"] is None else str(told["readme"]))
        except (ValueError, KeyError, TypeError) as error:
            raise StageError(
                f"{where} is no longer what a push wrote ({error!r}), so nothing says which files are its; delete it, "
                "and by hand what should go"
            ) from error


def note_path(part: str) -> str:
    """Where the note of a part lies."""
    return f"{OURS}/{part}/pushed.json"


def part_of_note(path: str) -> str | None:
    """The part whose note this path is."""
    parts = path.split("/")
    return parts[1] if len(parts) == 3 and path == note_path(parts[1]) else None


def laid_out(kind: Kind, part: str, files: Mapping[str, Content], rows: Collection[str]) -> dict[str, Content]:
    """An artifact's files by their paths in a repository. `rows`: those of a dataset with its rows, in order.

    Rows are named as `datasets` looks for them first, whatever the repository's page says and whatever else it has.
    """
    if kind == "model":
        return dict(files)
    named = {name: f"data/{part}-{index:05}-of-{len(rows):05}.parquet" for index, name in enumerate(rows)}
    return {named.get(name, f"{OURS}/{part}/{name}"): content for name, content in files.items()}


def stale(kind: Kind, part: str, files: Collection[str], there: Collection[str], before: Note | None) -> list[str]:
    """What of a repository has to go for the part to be these files and nothing else."""
    noted = () if before is None else before.files
    return [path for path in there if path not in files and (path in noted or _is_of(kind, part, path))]


def _is_of(kind: Kind, part: str, path: str) -> bool:
    if kind == "model":
        return "/" not in path and any(fnmatchcase(path, pattern) for pattern in _OF_MODELS)
    return path in _ONCE_OF_DATASETS or fnmatchcase(path, f"data/{part}-?????-of-?????.parquet")


def contents(info: Any) -> dict[str, str]:
    """Path -> hash of what it holds (SHA-256 of large files, git's of the others), as the Hub tells it."""
    return {one.rfilename: one.blob_id if one.lfs is None else one.lfs.sha256 for one in info.siblings}
