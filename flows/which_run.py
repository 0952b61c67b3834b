"""Which run a person means: by id, by the beginning of one, or counted back from the newest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from artifacts import Store
from artifacts.errors import RequestError
from flows.reporting.wiring import in_order

LATEST = re.compile(r"latest(?:~(\d+))?")


def read_run(store: Store, reference: str) -> dict[str, Any]:
    """The payload of `latest`, `latest~1` (the one before), a run's id, or the beginning of just one id; its stages in
    the recipe's order. Raises RequestError."""
    return in_order(store.read_run(run_id(store, reference)))


def newest_with(store: Store, stage: str) -> dict[str, Any]:
    """As `read_run`, of the newest run with a stage of that name, or where none has one, of the newest."""
    for name in store.runs():
        run = store.read_run(name)
        if stage in run.get("stages", {}):
            return in_order(run)
    return read_run(store, "latest")


def starts(store: Store, sweep: str) -> list[dict[str, Any]]:
    """All runs of a sweep, the newest first; a trial that was interrupted has several."""
    named = (store.read_run(name) for name in store.runs() if f"-{sweep}-" in name)  # ids have it: others stay unread
    return [run for run in named if (run.get("sweep") or {}).get("name") == sweep]


def trials(runs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of a sweep's runs (`starts`) those that stand for its trials, in the order of these: of each combination the
    newest that ended well, or else the newest."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        settings = json.dumps(run["sweep"]["settings"], sort_keys=True)
        if settings not in found or (run["state"] == "ok" and found[settings]["state"] != "ok"):
            found[settings] = in_order(run)
    return sorted(found.values(), key=lambda run: int(run["sweep"]["trial"]))


def seconds_in_all(runs: Iterable[Mapping[str, Any]], settings: Mapping[str, Any], recipe: str) -> float:
    """What the runs of one trial took together: those with these settings and the same text of the recipe."""
    mine = (run for run in runs if run["sweep"]["settings"] == settings and run.get("recipe_yaml") == recipe)
    return float(sum(run.get("seconds") or 0.0 for run in mine))


def named(store: Store, reference: str) -> tuple[str, str]:
    """(`run`, its id) or (`sweep`, its name): of `latest` the sweep where the newest run is a trial."""
    if starts(store, reference):
        return "sweep", reference
    found = run_id(store, reference)
    if reference == "latest" and (trial := store.read_run(found).get("sweep")):
        return "sweep", str(trial["name"])
    return "run", found


def run_id(store: Store, reference: str) -> str:
    """Its id; a reference that nothing is known of is given back, for the store to say so."""
    counted = LATEST.fullmatch(reference)
    runs = store.runs()
    if counted is None:
        begun = [found for found in runs if found.startswith(reference)]
        if reference not in runs and len(begun) > 1:
            raise RequestError(f"{reference!r} may be {len(begun)} runs: {', '.join(begun[:5])}; write more of it")
        return begun[0] if reference not in runs and begun else reference
    if not runs:
        raise RequestError(f"there is no run in {store.url} yet")
    back = int(counted.group(1) or 0)
    if back >= len(runs):
        raise RequestError(f"{reference}: there are {len(runs)} runs in {store.url}; `posttrain ls` shows the newest")
    return runs[back]
