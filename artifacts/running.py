"""Runs that have not said how they ended: whether they go on, or were killed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeGuard

from artifacts import runs
from artifacts.digest import is_sha256
from artifacts.files import Files
from artifacts.job_folders import last_sign
from artifacts.leases import Lease
from artifacts.owner import is_dead, lives_here, owner_tag

QUIET_SECONDS = 3600.0
"""A run of another machine that works on no stage has said so before this time, if it still goes on."""


def write(files: Files, run_id: str, payload: Mapping[str, Any]) -> None:
    """What this process has done so far of a run; its stages are `waiting`, `running`, or have ended."""
    runs.write(files, run_id, {**payload, "state": "running", "process": owner_tag()})


def read(files: Files, run_id: str, scratch: Path) -> dict[str, Any]:
    """The run as it stands: `killed` where whoever ran it is gone. `scratch`: where this machine works for the store.
    Raises as `runs.read`."""
    payload = runs.read(files, run_id)
    if payload.get("state") != "running" or _goes_on(files, run_id, payload):
        return payload
    payload = runs.read(files, run_id)  # it may have ended well before its process did
    return payload if payload.get("state") != "running" else _killed(payload, last_sign(scratch / run_id))


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


def _killed(payload: Mapping[str, Any], sign: float | None) -> dict[str, Any]:
    stages = {name: _cut_off(entry) for name, entry in payload.get("stages", {}).items()}
    lasted = max(found for found in (payload.get("seconds"), _seconds_until(payload, sign), 0.0) if _is_number(found))
    return {**payload, "state": "killed", "seconds": round(lasted, 3), "stages": stages}


def _seconds_until(payload: Mapping[str, Any], sign: float | None) -> float | None:
    """From the run's start to the time, both by the clock of the machine that it ran on; None: not known."""
    try:
        return None if sign is None else sign - datetime.fromisoformat(str(payload.get("started_at"))).timestamp()
    except (ValueError, OverflowError):
        return None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float)


def _cut_off(entry: Mapping[str, Any]) -> dict[str, Any]:
    if entry.get("state") == "running":
        return {**entry, "state": "interrupted", "error": "the run was killed while this stage was at work"}
    if entry.get("state") == "waiting":
        return {**entry, "state": "skipped", "reason": "the run was killed before"}
    return dict(entry)
