"""Names of a recipe's sources as people wrote them, for what is said of artifacts: manifests hold digests alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from artifacts import scrub
from flows.recipe import Recipe


def source_of(recipe: Recipe, stage: str) -> str:
    """Where the rows of a stage of the recipe come from; empty where it reads artifacts alone."""
    return named(recipe.document.data["stages"][stage].get("with"))


def named(settings: Any) -> str:
    """`chats.jsonl`, `arithmetic.py:problems` or a URL, of the `with` of a stage; a URL without its query, where
    keys stand."""
    source = settings.get("source") if isinstance(settings, Mapping) else None
    if not isinstance(source, Mapping):
        return ""
    written = str(source.get("path") or source.get("function") or "")
    place, _, query = written.partition("?")  # `?` alone is part of a pattern
    return scrub(place if "://" in written and "=" in query else written)
