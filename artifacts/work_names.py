"""Whose unfinished work is whose: the store keeps it under fingerprints, and people know stages of recipes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from artifacts import index, runs
from artifacts.errors import RequestError, StoreError
from artifacts.store import Store

NEWEST = 200
"""Runs that are looked at: a store may hold any number."""


def work_names(store: Store, fingerprints: Iterable[str], finished: Mapping[str, str]) -> dict[str, str]:
    """Fingerprint -> `recipe/stage`, of those that a record (`finished`: fingerprint -> kind of stage) or one of the
    newest runs tells."""
    wanted = set(fingerprints)
    found = {name: told for name in wanted & finished.keys() if (told := _recorded(store, finished[name], name))}
    for run_id in store.runs()[:NEWEST] if wanted > found.keys() else ():
        if wanted <= found.keys():
            break
        for fingerprint, name in _of_run(store, run_id).items():
            if fingerprint in wanted:
                found.setdefault(fingerprint, name)
    return found


def _recorded(store: Store, stage: str, fingerprint: str) -> str:
    try:
        records = store.records(stage, fingerprint) if index.STAGE.fullmatch(stage) else []
    except StoreError:  # a name is not worth the refusal to clean up
        return ""
    told = (record.provenance for record in records if record.provenance.get("stage_name"))
    return next((_joined(found.get("recipe"), found["stage_name"]) for found in told), "")


def _of_run(store: Store, run_id: str) -> dict[str, str]:
    try:
        payload = runs.read(store.files, run_id)
    except (StoreError, RequestError):  # `verify` names what is damaged; or it was deleted since it was listed
        return {}
    stages = payload.get("stages") or {}
    return {str(entry.get("fingerprint")): _joined(payload.get("recipe"), name) for name, entry in stages.items()}


def _joined(recipe: Any, stage: Any) -> str:
    return f"{recipe}/{stage}" if recipe else str(stage)
