"""A built-in reward as `posttrain rewards NAME` describes it: fields, an example for a recipe and for a row."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import yaml

from artifacts.errors import RequestError
from flows.fields import FieldRow, field_rows
from stages.rollouts.reward_examples import EXAMPLES
from stages.rollouts.reward_spec import REWARDS, RewardSpec, unknown_reward


def describe_reward(name: str) -> dict[str, Any]:
    """As JSON values. Raises RequestError for a name that is not built in."""
    if name not in REWARDS:
        raise RequestError(unknown_reward(name))
    reward, example = REWARDS[name], EXAMPLES[name]
    summary, _, more = (inspect.getdoc(reward) or "").partition("\n\n")
    return {
        "name": name,
        "summary": " ".join(summary.split()),
        "more": " ".join(more.split()),
        "fields": [dataclasses.asdict(row) for row in field_rows(reward)],
        "recipe": recipe_of(name, dict(example.parameters)),
        "example": example.to_json(),
    }


def recipe_of(name: str, parameters: dict[str, Any]) -> str:
    """What stands in a stage's `with`, as YAML."""
    entry: Any = {"name": name, "parameters": parameters} if parameters else name
    written = yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=10_000).removesuffix("...\n")
    return f"rewards:\n  - {written.strip()}\n"


def entry_rows() -> list[FieldRow]:
    """The fields that every entry of `rewards` may have."""
    return list(field_rows(RewardSpec))
