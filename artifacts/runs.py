"""What a run of a recipe did, one file a run, rewritten while it goes on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from artifacts.errors import DamagedError, RequestError
from artifacts.files import Files
from artifacts.reading import read_sealed
from artifacts.sealed import seal, unseal

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}")
PARTS = ("inputs", "outputs", "metrics", "timings", "counts")
"""Of a stage's entry."""


def write(files: Files, run_id: str, payload: Mapping[str, Any]) -> None:
    files.write(key(run_id), seal(payload))


def read(files: Files, run_id: str) -> dict[str, Any]:
    """Raises RequestError for an unknown run, naming the nearest one; DamagedError."""
    place = key(run_id)
    try:
        value = unseal(read_sealed(files, place), f"{files.url}/{place}")
    except FileNotFoundError:
        close = difflib.get_close_matches(run_id, names(files), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RequestError(f"there is no run {run_id!r} in {files.url}{hint}") from None
    if not _looks_right(value):
        raise DamagedError(f"{files.url}/{place} is not what a run writes; delete it")
    return value


def _looks_right(payload: Mapping[str, Any]) -> bool:
    """Whether what a run says of its stages, if anything, has the shape that others rely on."""
    stages = payload.get("stages", {})
    return isinstance(stages, dict) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(part), dict | None) for part in PARTS)
        for entry in stages.values()
    )


def names(files: Files) -> list[str]:
    """Ids of the runs, the one written last first."""
    return [name for _, name in sorted(written(files), reverse=True)]


def written(files: Files) -> list[tuple[float, str]]:
    """(when it was written last, id) of every run; a file whose name is no run's is none."""
    tree = files.tree("runs")
    found = [(tree[path].modified, path.removesuffix(".json")) for path in tree if path.endswith(".json")]
    return [(modified, name) for modified, name in found if NAME.fullmatch(name)]


def key(run_id: str) -> str:
    """Where its file is."""
    if not NAME.fullmatch(run_id):
        raise RequestError(f"not the id of a run (letters, digits, '.', '_' and '-'): {run_id!r}")
    return f"runs/{run_id}.json"
