"""What a stage's result depends on, and the fingerprint of that.

The identity is readable JSON, so that two can be compared field by field; the fingerprint is its SHA-256.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from artifacts.digest import canonical_json, sha256_bytes
from stages.external import content_of, load_code, resolve_reference
from stages.stage import Config, External, Stage

__all__ = [
    "Look",
    "Named",
    "fingerprint",
    "identity",
    "is_operational",
    "load_code",
    "named_outside",
    "operational_config",
    "resolve_externals",
    "semantic_config",
    "with_operational",
]

Transform = Callable[[External, str], Any]
Look = Callable[[str, str], Any]
"""Kind and place of something outside -> its content, as `stages.external.content_of`."""


@dataclass(frozen=True)
class Named:
    """Something outside that a configuration names. `field`: where, as in `with.source.path`."""

    kind: str
    where: str
    field: str
    content: Any


def is_operational(field: FieldInfo) -> bool:
    """Whether the field was declared with `operational(...)`."""
    extra = field.json_schema_extra
    return isinstance(extra, Mapping) and bool(extra.get("operational"))


def semantic_config(config: Config, look: Look = content_of) -> dict[str, Any]:
    """The configuration that decides the result: operational fields left out, files and code by content."""
    return _walk_model(config, lambda mark, text: look(mark.kind, text), keep_operational=False)


def named_outside(config: Config, contents: Any) -> list[Named]:
    """What the configuration names, with the content that it has in `contents`: the semantic configuration of an
    identity."""
    marked = _walk_model(config, lambda mark, text: Named(mark.kind, text, "", None), keep_operational=False)
    return list(_with_contents(marked, contents, "with"))


def _with_contents(marked: Any, contents: Any, field: str) -> Iterator[Named]:
    if isinstance(marked, Named):
        yield replace(marked, field=field, content=contents)
    elif isinstance(marked, Mapping):
        for key in marked:
            if key in contents:  # an older version may not have had the field
                yield from _with_contents(marked[key], contents[key], f"{field}.{key}")
    elif isinstance(marked, list | tuple):
        for index, (entry, content) in enumerate(zip(marked, contents, strict=True)):
            yield from _with_contents(entry, content, f"{field}.{index}")


def operational_config(config: Config) -> dict[str, Any]:
    """Its operational fields, which the identity leaves out. Those of settings within settings are in their places, of
    one in a list under its index as text: `{"rewards": {"0": {"cache": true}}}`."""
    return _operational(config)


def with_operational(values: Any, operational: Mapping[str, Any]) -> Any:
    """A semantic configuration, or a part of one, with what `operational_config` said besides."""
    merged = dict(enumerate(values)) if isinstance(values, list) else dict(values)
    for key, value in operational.items():
        place = int(key) if isinstance(values, list) else key
        inner = merged.get(place)
        within = isinstance(value, Mapping) and isinstance(inner, Mapping | list)
        merged[place] = with_operational(inner, value) if within else value
    return list(merged.values()) if isinstance(values, list) else merged


def _operational(value: Any) -> dict[str, Any]:
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        own = {name for name, field in fields.items() if is_operational(field)}
        inner = {name: getattr(value, name) for name in fields if name not in own}
        return value.model_dump(mode="json", include=own) | _found_within(inner)
    if isinstance(value, list | tuple):
        return _found_within({str(index): entry for index, entry in enumerate(value)})
    return _found_within(value) if isinstance(value, Mapping) else {}


def _found_within(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found for name, entry in entries.items() if (found := _operational(entry))}


def resolve_externals(config: Config, base: Path) -> Config:
    """The same configuration with every relative file made absolute, counted from the folder `base`.

    Raises RequestError where a file, module or function does not exist.
    """
    values = _walk_model(config, lambda mark, text: resolve_reference(mark.kind, text, base), keep_operational=True)
    return type(config).model_validate(values)


def identity(
    stage: Stage, config: Config, input_digests: Mapping[str, str | list[str]], look: Look = content_of
) -> dict[str, Any]:
    """Everything that the result of the stage follows from, as JSON values."""
    return {
        "stage": stage.name,
        "version": stage.version,
        "config": semantic_config(config, look),
        "inputs": {name: input_digests[name] for name in sorted(input_digests)},
    }


def fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256 of the identity's canonical JSON, 64 hex digits."""
    return sha256_bytes(canonical_json(identity))


def _walk_model(model: BaseModel, transform: Transform, *, keep_operational: bool) -> dict[str, Any]:
    values = {}
    for name, field in type(model).model_fields.items():
        if is_operational(field) and not keep_operational:
            continue
        marks = [entry for entry in field.metadata if isinstance(entry, External)]
        values[name] = _walk(
            getattr(model, name), field.annotation, marks[0] if marks else None, transform, keep_operational
        )
    return values


def _walk(value: Any, annotation: Any, mark: External | None, transform: Transform, keep: bool) -> Any:
    """Apply `transform` to every string whose annotation carries an External mark."""
    if isinstance(value, BaseModel):
        return _walk_model(value, transform, keep_operational=keep)
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        mark = next((entry for entry in metadata if isinstance(entry, External)), mark)
        return _walk(value, inner, mark, transform, keep)
    arguments = [argument for argument in get_args(annotation) if argument not in (type(None), Ellipsis)]
    if isinstance(value, str):
        mark = mark or next((found for found in map(_mark_of, arguments) if found), None)
        return value if mark is None else transform(mark, value)
    if isinstance(value, Mapping):
        item = arguments[-1] if arguments else None
        return {key: _walk(entry, item, mark, transform, keep) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        item = arguments[0] if arguments else None
        return [_walk(entry, item, mark, transform, keep) for entry in value]
    return value


def _mark_of(annotation: Any) -> External | None:
    if get_origin(annotation) is Annotated:
        return next((entry for entry in get_args(annotation)[1:] if isinstance(entry, External)), None)
    return None
