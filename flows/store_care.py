"""The commands that look after a store. Each takes the parsed options and gives the exit status."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from artifacts.errors import DamagedError, MissingError, RequestError, StoreError
from flows.attempts import resumed_at
from flows.request import open_named, print_json
from flows.server import REPORTS, prefect_home
from stages.names import nearest

if TYPE_CHECKING:
    from artifacts import Artifact, Store
    from artifacts.survey import Item
    from artifacts.transfer import Moved

RUNS_LISTED = 20


def ls(options: Namespace) -> int:
    """`posttrain ls`"""
    store = open_named(options)
    _require_kind(store, options.kind)
    names: dict[Artifact, list[str]] = {}
    for name, named in store.aliases().items():
        names.setdefault(named, []).append(name)
    found = store.newest_first(options.kind)
    shown = found[: options.limit] if options.limit else found
    listed = [_listed(store, artifact, names.get(artifact, [])) for artifact in shown]
    runs = [_run_line(store, run_id) for run_id in store.runs()[:RUNS_LISTED]]
    if options.json:
        print_json({"store": store.url, "total": len(found), "artifacts": listed, "runs": runs})
    else:
        from flows import store_tables, tables

        tables.show(*store_tables.listing_tables(store.url, len(found), listed, runs))
    return 0


def du(options: Namespace) -> int:
    """`posttrain du`"""
    from artifacts.usage import usage

    store = open_named(options)
    found = usage(store)
    if options.json:
        print_json({"store": store.url, **asdict(found)})
    else:
        from flows import store_tables, tables

        tables.show(*store_tables.usage_tables(store.url, found))
    return 0


def gc(options: Namespace) -> int:
    """`posttrain gc`"""
    from artifacts.retention import Policy
    from artifacts.survey import survey

    policy = Policy(options.keep_runs, options.keep_days, options.grace_hours, options.keep_reward_days)
    store = open_named(options)
    found = survey(store, policy, prefect_home() / REPORTS)
    swept = None
    if options.delete:
        from artifacts.sweep import sweep

        swept = sweep(store, found, f"gc {os.getpid()}")
    if options.json:
        answer = {"goes": _items(found.goes), "stays": _items(found.stays), "problems": found.problems}
        if swept is not None:
            answer |= {"deleted": _items(swept.deleted), "spared": _items(swept.spared)}
        print_json({"store": store.url, **answer})
    else:
        from flows import store_tables, tables

        tables.show(*store_tables.survey_tables(store.url, found, swept))
    return 0


def verify(options: Namespace) -> int:
    """`posttrain verify`"""
    from artifacts.inspection import Checked, inspect

    store = open_named(options)
    named = [store.find(reference) for reference in options.artifact]
    looked_at = (Checked("artifact", found.id, tuple(store.verify(found))) for found in named)
    checked: Counter[str] = Counter()
    damaged: dict[str, list[str]] = {}
    for one in looked_at if named else inspect(store):
        checked[one.what] += 1
        if one.problems:
            damaged[one.name] = list(one.problems)
            print("\n".join(one.problems), file=sys.stderr)
    if options.json:
        print_json({"checked": checked["artifact"], "by_kind": dict(checked), "damaged": damaged})
    else:
        counts = ", ".join(f"{count} {_plural(what, count)}" for what, count in checked.items())
        print(f"{counts or 'nothing'} checked, {len(damaged)} damaged")
    return 1 if damaged else 0


def export(options: Namespace) -> int:
    """`posttrain export`"""
    from artifacts import transfer

    store = open_named(options)
    artifact = store.find(options.artifact)
    return _moved(options, transfer.export(store, [artifact], options.folder, lineage=options.lineage))


def import_(options: Namespace) -> int:
    """`posttrain import`"""
    from artifacts import transfer

    return _moved(options, transfer.import_(open_named(options), options.folder))


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    command.__name__.rstrip("_"): command for command in (ls, du, gc, verify, export, import_)
}


def _plural(what: str, count: int) -> str:
    """`1 alias`, `9 aliases`"""
    return what if count == 1 else f"{what}es" if what.endswith("s") else f"{what}s"


def _require_kind(store: Store, kind: str | None) -> None:
    """Raises RequestError for a kind that neither the store nor any stage has."""
    if kind is None or kind in (stored := store.files.children("artifacts")):
        return
    from stages import stage as registry

    made = {made for name in registry.STAGES for made in registry.load_stage(name).outputs.values()}
    known = sorted({*stored, *made})
    if kind not in known:
        raise RequestError(f"there is no kind {kind!r}{nearest(kind, known)}; there are: {', '.join(known)}")


def _listed(store: Store, artifact: Artifact, aliases: list[str]) -> dict[str, Any]:
    entry = {"id": artifact.id, "kind": artifact.kind, "aliases": sorted(aliases)}
    try:
        manifest = store.manifest(artifact)
    except (DamagedError, MissingError) as error:
        return {**entry, "damaged": str(error)}
    return {**entry, "stage": manifest.producer.get("stage"), "files": len(manifest.files), "bytes": manifest.size}


def _run_line(store: Store, run_id: str) -> dict[str, Any]:
    try:
        payload = store.read_run(run_id)
    except StoreError as error:
        return {"run": run_id, "damaged": str(error)}
    known = {name: payload.get(name) for name in ("run", "recipe", "state", "started_at", "seconds")}
    resumed = {name: resumed_at(entry) for name, entry in payload.get("stages", {}).items()}
    return {**known, "resumed": {name: step for name, step in resumed.items() if step is not None}}


def _items(items: list[Item]) -> list[dict[str, Any]]:
    return [
        {"what": item.what, "name": item.name, "of": item.of, "bytes": item.size, "why": item.reason} for item in items
    ]


def _moved(options: Namespace, moved: Moved) -> int:
    if options.json:
        ids = {name: [found.id for found in getattr(moved, name)] for name in ("copied", "there")}
        besides = {name: list(getattr(moved, name)) for name in ("left_out", "named", "taken")}
        print_json({"folder": str(options.folder), **ids, "records": moved.records, **besides})
    else:
        for artifact in moved.copied:
            print(artifact.id, artifact.kind)
        print(f"{len(moved.copied)} copied, {len(moved.there)} there already, {moved.records} records")
        for missing in moved.left_out:
            print(f"no record of {missing} {'were' if ',' in missing else 'was'} not exported")
        for words, names in (("named", moved.named), ("named otherwise there, and left so", moved.taken)):
            if names:
                print(f"{words}: {', '.join(f'@{name}' for name in names)}")
    return 0
