"""What changes when a recipe is deployed that was deployed before: the new command counts, and what it leaves out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

ON_REQUEST = "on request"

Changes = dict[str, dict[str, str]]
"""What changed -> how it was `before` and is `after`, in words."""


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Changes:
    """Between two rows of `prefect_schedule.rows` of one deployment: schedule, pool, store, and each setting."""
    old, new = dict(_described(before)), dict(_described(after))
    missing = "as the recipe says"
    compared = {name: {"before": old.get(name, missing), "after": new.get(name, missing)} for name in {**old, **new}}
    return {name: change for name, change in compared.items() if change["before"] != change["after"]}


def in_words(name: str, changed: Changes) -> Iterator[str]:
    """Lines for a terminal; none if nothing changed."""
    if changed:
        yield f"{name} was deployed before; this changed:"
    for what, change in changed.items():
        hint = " (neither --cron nor --interval was given)" if change["after"] == ON_REQUEST else ""
        yield f"  {what}: {change['before']} -> {change['after']}{hint}"


def checked_in_words(row: Mapping[str, Any]) -> Iterator[str]:
    """Who looked whether a run could begin; nothing where nobody was asked."""
    if found := row["checked"]:
        stages = f" ({found['stages']})" if found["stages"] else ""
        yield f"{row['name']}: a run could begin{stages}, checked {found['by']}"


def _described(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "schedule", "; ".join(row["schedule"]) or ON_REQUEST
    yield "pool", str(row["pool"])
    yield "store", str(row["store"])
    for name, value in row["parameters"].items():
        yield f"--set {name}", json.dumps(value, ensure_ascii=False)
    for text in row["set"]:
        name, _, value = text.partition("=")
        yield f"--set {name.strip()}", value.strip()
