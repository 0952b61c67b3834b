"""What garbage collection deleted, and when: kept as records are, so that a plan can say what became of a result."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable

from artifacts.errors import DamagedError, RequestError
from artifacts.files import Files
from artifacts.folder import in_parallel
from artifacts.manifest import Artifact
from artifacts.reading import read_sealed
from artifacts.sealed import seal, unseal

logger = logging.getLogger(__name__)
FOLDER = "collected"
THREADS = 8


def note(files: Files, artifacts: Iterable[Artifact]) -> None:
    """Says that these were deleted on purpose, just now; nothing to say of none."""
    named = [artifact.to_json() for artifact in artifacts]
    if named:
        files.write(f"{FOLDER}/{time.time_ns():020d}-{os.urandom(6).hex()}.json", seal({"artifacts": named}))


def read(files: Files) -> dict[Artifact, float]:
    """Artifact -> when it was deleted last, by the store's clock (seconds since 1970). A damaged note is named in the
    log and left out."""
    notes = [(stored.modified, f"{FOLDER}/{name}") for name, stored in files.tree(FOLDER).items()]
    found: dict[Artifact, float] = {}
    for when, artifacts in in_parallel(lambda one: (one[0], _read_one(files, one[1])), sorted(notes), THREADS):
        found |= dict.fromkeys(artifacts, when)
    return found


def _read_one(files: Files, key: str) -> list[Artifact]:
    where = f"{files.url}/{key}"
    try:
        return [Artifact.from_json(item) for item in unseal(read_sealed(files, key), where)["artifacts"]]
    except (KeyError, TypeError, AttributeError, RequestError, DamagedError) as error:
        logger.warning("%s is no note of what was collected: %s", where, error)
        return []
    except FileNotFoundError:
        return []  # deleted since it was listed
