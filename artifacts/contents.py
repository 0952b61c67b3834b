"""An artifact as it lies in the store: its manifest, its files, and whether they are what the manifest says."""

from __future__ import annotations

import logging
from pathlib import Path

from artifacts.errors import DamagedError, MissingError, StoreError
from artifacts.files import Files
from artifacts.folder import differences
from artifacts.manifest import Artifact, Manifest
from artifacts.materialize import fetched, problems_of
from artifacts.reading import read_sealed
from artifacts.sealed import seal

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
PAYLOAD = "files"
DAMAGED = "damaged.json"
"""Left beside a manifest by whoever found the content wrong: look-ups do not count the artifact until a new
copy is put."""


def read_manifest(files: Files, artifact: Artifact) -> Manifest:
    """Raises MissingError when the artifact is not there, DamagedError when its manifest is not whole."""
    key = f"{artifact.key}/{MANIFEST}"
    try:
        data = read_sealed(files, key)
    except FileNotFoundError:
        raise MissingError(f"{artifact.id} ({artifact.kind}) is not in {files.url}") from None
    return Manifest.from_bytes(data, artifact, f"{files.url}/{key}")


def is_intact(files: Files, artifact: Artifact) -> bool:
    """Whether the manifest is whole and every file is there with its size; no content is read. What is wrong is named
    in the log."""
    found = files.tree(artifact.key)
    if MANIFEST not in found:
        return False
    if DAMAGED in found:
        logger.warning("%s was found damaged; it is not counted", artifact)
        return False
    try:
        manifest = read_manifest(files, artifact)
    except MissingError:
        return False
    except DamagedError as error:
        logger.warning("%s; it is not counted", error)
        return False
    sizes = {
        path.removeprefix(f"{PAYLOAD}/"): stored.size
        for path, stored in found.items()
        if path.startswith(f"{PAYLOAD}/")
    }
    problems = differences(sizes, manifest.files)
    if problems:
        logger.warning("%s is damaged: %s; it is not counted", artifact, "; ".join(problems[:3]))
    return not problems


def has_every_byte(files: Files, artifact: Artifact) -> bool:
    """Whether the content is right; every byte is read."""
    try:
        return not problems_of(files, artifact.key, PAYLOAD, read_manifest(files, artifact).files)
    except (DamagedError, MissingError):
        return False


def materialized(files: Files, artifact: Artifact, cache: Path) -> Path:
    """A local folder with exactly the artifact's files, every byte checked: a local store's own, else one of the cache.
    Raises MissingError, or DamagedError that names the files; then the artifact is marked as damaged."""
    try:
        manifest = read_manifest(files, artifact)
        if files.local_root is None:
            return fetched(files, f"{artifact.key}/{PAYLOAD}", manifest.files, cache, artifact.key)
        problems = problems_of(files, artifact.key, PAYLOAD, manifest.files)
        if problems:
            raise DamagedError(
                f"{artifact.id} ({artifact.kind}) in {files.url} is damaged: {'; '.join(problems[:5])}; "
                "run the recipe again: the stage that made it will run"
            )
        return files.local_root / artifact.key / PAYLOAD
    except DamagedError as error:
        _mark_damaged(files, artifact, str(error))
        raise


def verified(files: Files, artifact: Artifact) -> list[str]:
    """What is wrong with every byte read, one line each; the artifact is marked as damaged, or no longer."""
    try:
        manifest = read_manifest(files, artifact)
    except (DamagedError, MissingError) as error:
        return [str(error)]
    problems = problems_of(files, artifact.key, PAYLOAD, manifest.files)
    if problems:
        _mark_damaged(files, artifact, "; ".join(problems))
    else:
        files.delete(f"{artifact.key}/{DAMAGED}")
    return [f"{artifact}: {problem}" for problem in problems]


def _mark_damaged(files: Files, artifact: Artifact, text: str) -> None:
    try:
        files.write(f"{artifact.key}/{DAMAGED}", seal({"problems": text}))
    except StoreError as error:
        logger.warning("cannot mark %s as damaged: %s", artifact, error)
