"""Names and markers of checkpoints: the marker lists the files, so a folder that has one is finished."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from artifacts.digest import FileEntry
from artifacts.errors import DamagedError, RequestError
from artifacts.manifest import file_list_problems
from artifacts.sealed import seal

DONE = "DONE.json"
PART = "part.json"
"""The marker of one process's part; what counts is DONE, which lists the files of all parts."""
NAME = re.compile(r"(\d{10})-[0-9a-f]+")


def new_name(step: int) -> str:
    """The name of a checkpoint after so many steps. Raises RequestError for a step that no name can hold."""
    if not 0 <= step < 10**10:
        raise RequestError(f"a checkpoint's step is between 0 and 10^10, found {step}")
    # the time orders checkpoints of one step
    return f"{step:010d}-{time.time_ns():016x}{os.urandom(4).hex()}"


def step_of(name: str) -> int:
    """The steps behind the checkpoint of that name."""
    return int(name[:10])


def part_name(number: int) -> str:
    """The folder of one process's part."""
    return f"part-{number:05d}"


def marker_bytes(step: int, entries: Iterable[FileEntry]) -> bytes:
    """The marker of a folder with these files."""
    ordered = sorted(entries, key=lambda entry: entry.path)
    rows = [{"path": entry.path, "size": entry.size, "sha256": entry.sha256} for entry in ordered]
    return seal({"format": 1, "step": step, "files": rows})


def marked_files(marker: Mapping[str, Any], where: str) -> tuple[FileEntry, ...]:
    """The files that an unsealed marker lists. Raises DamagedError, naming `where`."""
    try:
        files = tuple(FileEntry(row["path"], row["size"], row["sha256"]) for row in marker["files"])
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{where} is no marker: {type(error).__name__}") from None
    problems = file_list_problems(files)
    if problems:
        raise DamagedError(f"{where} is no marker: {problems[0]}")
    return files
