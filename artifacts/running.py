"""Runs that have not said how they ended: whether they go on, or were killed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from artifacts import runs
from artifacts.digest import is_sha256
from artifacts.files import Files
from artifacts.leases import Lease
from artifacts.owner import is_dead, lives_here, owner_tag

QUIET_SECONDS = 3600.0
"""A run of another machine that works on no stage has said so before this time, if it still goes on."""


def write(files: Files, run_id: str, payload: Mapping[str, Any]) -> None:
    """What this process has done so far of a run; its stages are `waiting`, `running`, or have ended."""
    runs.write(files, run_id, {**payload, "state": "running", "process": owner_tag()})


def read(files: Files, run_id: str) -> dict[str, Any]:
    """The run as it stands: `killed` where whoever ran it is gone. Raises as `runs.read`."""
    payload = runs.read(files, run_id)
    if payload.get("state") != "running" or _goes_on(files, run_id, payload):
        return payload
    payload = runs.read(files, run_id)  # it may have ended well before its process did
    return payload if payload.get("state") != "running" else _killed(payload)


def _goes_on(files: Files, run_id: str, payload: Mapping[str, Any]) -> bool:
    """By its process where that is of this machine; of others by the leases of the stages at work."""
    process = str(payload.get("process"))
    if is_dead(process) or lives_here(process):
        return not is_dead(process)
    at_work = [
        entry["fingerprint"]
        for entry in payload.get("stages", {}).values()
        if entry.get("state") == "running" and is_sha256(str(entry.get("fingerprint")))
    ]
    if at_work:
        return any(Lease(files, fingerprint, "reader").holder() is not None for fingerprint in at_work)
    age = files.age(runs.key(run_id))
    return age is None or age < QUIET_SECONDS


def _killed(payload: Mapping[str, Any]) -> dict[str, Any]:
    stages = {name: _cut_off(entry) for name, entry in payload.get("stages", {}).items()}
    return {**payload, "state": "killed", "stages": stages}


def _cut_off(entry: Mapping[str, Any]) -> dict[str, Any]:
    if entry.get("state") == "running":
        return {**entry, "state": "interrupted", "error": "the run was killed while this stage was at work"}
    if entry.get("state") == "waiting":
        return {**entry, "state": "skipped", "reason": "the run was killed before"}
    return dict(entry)
