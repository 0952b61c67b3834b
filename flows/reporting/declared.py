"""What a stage's Config declares, and what the store's record says that a result was made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticUndefined, to_jsonable_python

from artifacts.errors import PosttrainError
from flows.reporting.reading import Reader
from flows.reporting.text import short
from stages.stage import STAGES, load_stage


def record_of(
    name: str, uses: str, entry: Mapping[str, Any], reader: Reader
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Identity and provenance of the newest record of this result; empty for a stage that has none."""
    if not entry.get("fingerprint") or entry["state"] not in ("ran", "cached"):
        return {}, {}
    try:
        records = reader.store.records(uses, str(entry["fingerprint"]))
    except PosttrainError as error:
        reader.note(f"{name}: its record cannot be read: {error}")
        return {}, {}
    if not records:
        reader.note(f"{name}: the store has no record of {short(str(entry['fingerprint']))} any more")
        return {}, {}
    return records[0].identity, records[0].provenance


def declared(name: str, uses: str, reader: Reader) -> tuple[dict[str, Any], dict[str, str], set[str]]:
    """Defaults, meanings and operational fields of a stage's Config."""
    if uses not in STAGES:
        reader.note(f"{name}: this version has no stage {uses!r}, so defaults are not told from settings")
        return {}, {}, set()
    fields = load_stage(uses).config.model_fields
    defaults = {}
    for field, info in fields.items():
        default = info.get_default(call_default_factory=True, validated_data={})
        if default is not PydanticUndefined:
            defaults[field] = to_jsonable_python(default)
    meanings = {field: info.description or "" for field, info in fields.items()}
    operational = {
        field
        for field, info in fields.items()
        if isinstance(info.json_schema_extra, Mapping) and info.json_schema_extra.get("operational")
    }
    return defaults, meanings, operational
