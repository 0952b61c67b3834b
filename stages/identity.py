"""What a stage's result depends on, and the fingerprint of that.

The identity is readable JSON, so that two can be compared field by field; the fingerprint is its SHA-256.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from artifacts.digest import canonical_json, sha256_bytes
from stages.external import code_identity, data_identity, load_code, resolve_reference
from stages.stage import Config, External, Stage

__all__ = [
    "fingerprint",
    "identity",
    "is_operational",
    "load_code",
    "operational_config",
    "resolve_externals",
    "semantic_config",
]

Transform = Callable[[External, str], Any]


def is_operational(field: FieldInfo) -> bool:
    """Whether the field was declared with `operational(...)`."""
    extra = field.json_schema_extra
    return isinstance(extra, Mapping) and bool(extra.get("operational"))


def semantic_config(config: Config) -> dict[str, Any]:
    """The configuration that decides the result: operational fields left out, files and code by content."""
    return _walk_model(config, _content, keep_operational=False)


def operational_config(config: Config) -> dict[str, Any]:
    """Its operational fields, which the identity leaves out."""
    fields = type(config).model_fields
    values = config.model_dump(mode="json")
    return {name: values[name] for name, field in fields.items() if is_operational(field)}


def resolve_externals(config: Config, base: Path) -> Config:
    """The same configuration with every relative file made absolute, counted from the folder `base`.

    Raises RequestError where a file, module or function does not exist.
    """
    values = _walk_model(config, lambda mark, text: resolve_reference(mark.kind, text, base), keep_operational=True)
    return type(config).model_validate(values)


def identity(stage: Stage, config: Config, input_digests: Mapping[str, str | list[str]]) -> dict[str, Any]:
    """Everything that the result of the stage follows from, as JSON values."""
    return {
        "stage": stage.name,
        "version": stage.version,
        "config": semantic_config(config),
        "inputs": {name: input_digests[name] for name in sorted(input_digests)},
    }


def fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256 of the identity's canonical JSON, 64 hex digits."""
    return sha256_bytes(canonical_json(identity))


def _content(mark: External, text: str) -> Any:
    return code_identity(text) if mark.kind == "code" else data_identity(text)


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
