"""The form in Prefect's pages from which a run of a deployed recipe is started, as a JSON schema.

Prefect's server checks every run's values by it. A parameter takes what the fields take that it is written in, so what
is wrong with a value is seen before a run begins; what a schema cannot say, the recipe says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from flows.document import Place
from flows.fields import Slot, expectation, field_rows, slots_at
from flows.recipe import RecipeStage

GIVEN = "x-given"
"""In the schema of a parameter whose value is that of `posttrain deploy --set`."""
_WITH = 2
"""The place of `with` in `stages.NAME.with.FIELD`."""
_KINDS: dict[Any, str] = {int: "integer", float: "number", bool: "boolean", str: "string"}
_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


@dataclass(frozen=True)
class Use:
    """Where a recipe has `${parameter}`. `whole`: the value there is nothing else."""

    parameter: str
    place: Place
    whole: bool


def run_form(
    stages: Mapping[str, RecipeStage], values: Mapping[str, Any], uses: Sequence[Use], replaced: Mapping[str, Any]
) -> dict[str, Any]:
    """`values`: what runs begin with. `replaced`: the recipe's own values of parameters that were set."""
    names, parameters = list(stages), values["parameters"]
    properties: dict[str, dict[str, Any]] = {
        "parameters": {
            "type": "object",
            "description": "The recipe's parameters.",
            "properties": {
                name: {
                    "title": name,
                    "position": position,
                    "default": value,
                    **_of_parameter(
                        stages, value, [use for use in uses if use.parameter == name], _note(name, replaced)
                    ),
                    **({GIVEN: True} if name in replaced else {}),
                }
                for position, (name, value) in enumerate(parameters.items())
            },
            "required": list(parameters),  # a value left out would fall back to the recipe's own
            "additionalProperties": False,
        },
        "set": {**_texts(), "description": "Changes to the recipe, one a line: dpo.beta=0.2"},
        "only": {**_texts(names), "description": "Run these stages alone, with their inputs from the store."},
        "start": {**_texts(names), "description": "Run these stages and all that follows from them (--from)."},
        "until": {**_texts(names), "description": "Run these stages and all that they need."},
        "force": {**_texts(names), "description": "Run these stages even if their results are in the store."},
        "store": {"type": "string", "description": "Where artifacts are kept."},
        "recipe": {"type": "string", "description": "The recipe: a YAML file, or the name of a shipped one."},
    }
    titles = {"start": "from"}
    for position, (name, schema) in enumerate(properties.items()):
        schema.update(title=titles.get(name, name), position=position, default=values[name])
    form = {"title": "Parameters", "type": "object", "properties": properties, "required": ["recipe"]}
    return {**form, "additionalProperties": False}


def _texts(choices: Sequence[str] | None = None) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "string", **({} if choices is None else {"enum": list(choices)})}}


def _of_parameter(
    stages: Mapping[str, RecipeStage], value: Any, uses: Sequence[Use], note: Sequence[str]
) -> dict[str, Any]:
    """What it takes, as far as the fields that it is written in agree, and in words; else what is like its value."""
    fields = [_slots(stages, use) for use in uses]
    taken = [_taken(slots) if use.whole else {} for use, slots in zip(uses, fields, strict=True)]
    agreed = taken[0] if taken and all(other == taken[0] for other in taken) else {}
    words = [" ".join(filter(None, [", ".join(_called(use) for use in uses), *_said(stages, uses, fields)])), *note]
    return {**(agreed or _like(value)), "description": " ".join(words)}


def _slots(stages: Mapping[str, RecipeStage], use: Use) -> list[Slot]:
    """Of a field of a stage's configuration; of other places nothing is known."""
    if use.place[:1] != ("stages",) or use.place[_WITH : _WITH + 1] != ("with",):
        return []
    return slots_at(stages[str(use.place[1])].uses.config, use.place[_WITH + 1 :])


def _taken(alternatives: Sequence[Slot]) -> dict[str, Any]:
    plain = [slot for slot in alternatives if slot.annotation is not type(None)]
    choices = [choice for slot in plain for choice in _choices(slot)]
    if choices and all(_choices(slot) for slot in plain):
        return {"type": "string", "enum": choices}
    if len(plain) != 1 or plain[0].annotation not in _KINDS:
        return {}
    (slot,) = plain
    bounds = {
        words: bound
        for entry in slot.metadata
        for name, words in _BOUNDS.items()
        if isinstance(bound := getattr(entry, name, None), int | float)
    }
    return {"type": _KINDS[slot.annotation], **bounds}


def _choices(slot: Slot) -> list[str]:
    """The texts to choose from; none where it takes anything else."""
    found = get_args(slot.annotation) if get_origin(slot.annotation) is Literal else ()
    return list(found) if all(isinstance(choice, str) for choice in found) else []


def _said(stages: Mapping[str, RecipeStage], uses: Sequence[Use], fields: Sequence[Sequence[Slot]]) -> list[str]:
    """What the first field takes and means."""
    for use, slots in zip(uses, fields, strict=True):
        if use.whole and slots:
            name = ".".join(part for part in use.place[_WITH + 1 :] if isinstance(part, str))
            rows = {row.name: row for row in field_rows(stages[str(use.place[1])].uses.config)}
            return [f"({expectation(slots)}):", rows[name].meaning] if name in rows else [f"({expectation(slots)})"]
    return []


def _called(use: Use) -> str:
    """`sft.max_steps`, as `--set` names it."""
    parts = [str(part) for part in use.place if part not in ("stages", "with")]
    return ".".join(parts) if use.whole else f"within {'.'.join(parts)}"


def _note(name: str, replaced: Mapping[str, Any]) -> list[str]:
    """That a value is not the recipe's."""
    if name not in replaced:
        return []
    own = "needs one" if (value := replaced[name]) is None else f"says {json.dumps(value, ensure_ascii=False)}"
    return [f"Given to posttrain deploy; the recipe {own}."]


def _like(value: Any) -> dict[str, Any]:
    """The schema that values like the default have; the recipe says better what is wrong with one of the kind."""
    # bool first: it is an int as well
    kinds: list[tuple[type | tuple[type, ...], str]] = [
        (bool, "boolean"),
        ((int, float), "number"),
        (str, "string"),
        (list, "array"),
        (dict, "object"),
    ]
    for kind, name in kinds:
        if isinstance(value, kind):
            return {"type": name, **({"items": {}} if name == "array" else {})}
    return {}
