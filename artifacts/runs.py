"""What a run of a recipe did, one file a run, rewritten while it goes on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from artifacts.errors import RequestError
from artifacts.files import Files
from artifacts.reading import read_sealed
from artifacts.sealed import seal, unseal

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}")


def write(files: Files, run_id: str, payload: Mapping[str, Any]) -> None:
    files.write(_key(run_id), seal(payload))


def read(files: Files, run_id: str) -> dict[str, Any]:
    """Raises RequestError for an unknown run, naming the nearest one; DamagedError."""
    key = _key(run_id)
    try:
        return unseal(read_sealed(files, key), f"{files.url}/{key}")
    except FileNotFoundError:
        close = difflib.get_close_matches(run_id, names(files), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RequestError(f"there is no run {run_id!r} in {files.url}{hint}") from None


def names(files: Files) -> list[str]:
    """Ids of the runs, the one written last first."""
    found = [(stored.modified, path) for path, stored in files.tree("runs").items() if path.endswith(".json")]
    return [path.removesuffix(".json") for _, path in sorted(found, reverse=True)]


def _key(run_id: str) -> str:
    if not NAME.fullmatch(run_id):
        raise RequestError(f"not the id of a run (letters, digits, '.', '_' and '-'): {run_id!r}")
    return f"runs/{run_id}.json"
