"""Rewards of the form of a completion: thinking tags, a regular expression, a JSON schema."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from artifacts.errors import DataError
from stages.rollouts.reward_base import BuiltIn, content_of


class ThinkFormat(BuiltIn):
    """1 where the completion is one `<think>...</think>` and what follows, as in TRL."""

    prefix: str = ""
    """What the prompt already wrote of the completion, such as "<think>"."""

    def score(self, completions: Sequence[Any]) -> list[float]:
        return [float(_is_thought(self.prefix + content_of(made))) for made in completions]


def _is_thought(text: str) -> bool:
    return text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text


class RegularExpression(BuiltIn):
    """1 where the completion matches a regular expression of Python."""

    # a hostile completion can take a careless pattern minutes
    timeout_seconds: ClassVar[float | None] = 10.0

    pattern: str
    """Flags stand in it: (?s), (?i), (?m)."""
    match: Literal["whole", "anywhere"] = "whole"
    """Whether all of the completion must match (without white space around it), or a part of it."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
        return pattern

    def score(self, completions: Sequence[Any]) -> list[float]:
        compiled = re.compile(self.pattern)
        matches = compiled.fullmatch if self.match == "whole" else compiled.search
        return [float(matches(content_of(made).strip()) is not None) for made in completions]


class JsonSchema(BuiltIn):
    """1 where the completion is JSON that a JSON schema allows."""

    # patterns of the schema meet hostile completions
    timeout_seconds: ClassVar[float | None] = 10.0

    expected: dict[str, Any] | None = None
    """The schema; null: `column` has one a row."""
    column: str | None = None
    """Column with the schema of each row, as a mapping or as JSON text."""
    fenced: bool = False
    """Read the last ``` block of the completion, and not all of it."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.expected is None) == (self.column is None):
            raise ValueError("give one of expected (a schema) and column (with the schema of each row)")
        if self.expected is not None:
            schema_validator(json.dumps(self.expected))
        return self

    def score(self, completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
        """None where a row has no schema. Raises DataError for a row whose schema is none."""
        schemas = self._schemas(len(completions), columns)
        return [
            None if schema is None else float(_allows(schema, _last_block(made) if self.fenced else content_of(made)))
            for schema, made in zip(schemas, completions, strict=True)
        ]

    def needed_columns(self) -> Sequence[tuple[str, ...]]:
        """The schemas', where the rows have them."""
        return () if self.column is None else ((self.column,),)

    def _schemas(self, count: int, columns: Any) -> list[str | None]:
        if self.column is None:
            return [json.dumps(self.expected)] * count
        if self.column not in columns:
            raise DataError(f"json_schema: the dataset has no column {self.column!r}; it has {', '.join(columns)}")
        found = columns[self.column]
        texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in found]
        for text, row_id in zip(texts, columns.get("row_id", [None] * count), strict=True):
            try:
                if text is not None:
                    schema_validator(text)
            except ValueError as error:
                raise DataError(f"json_schema: row {row_id}, column {self.column!r}: {error}") from error
        return texts


def _last_block(completion: Any) -> str:
    """What stands between the last two lines of ``` that open and close a block; "" where there is no block."""
    found = ""
    block: list[str] | None = None
    for line in content_of(completion).split("\n"):
        if not line.strip().startswith("```"):
            if block is not None:
                block.append(line)
        elif block is None:
            block = []
        else:
            found, block = "\n".join(block), None
    return found


@lru_cache(maxsize=256)
def schema_validator(schema_text: str) -> Any:
    """Raises ValueError for what is no schema. References lead to the schema itself only, never to a network."""
    import jsonschema
    import referencing

    schema = json.loads(schema_text)
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"not a JSON schema: {error.message} at {error.json_path}") from error
    return kind(schema, registry=referencing.Registry())


def _allows(schema_text: str, text: str) -> bool:
    try:
        value = json.loads(text, parse_constant=_refused, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return False
    try:
        return bool(schema_validator(schema_text).is_valid(value))
    except RecursionError:
        return False


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two values under one key mean different things to different readers."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is given twice")
    return values
