"""How built-in rewards are shown on the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from flows.tables import fields_table, plain_table


def rewards_tables(described: Iterable[Mapping[str, Any]], entry: Iterable[Mapping[str, Any]]) -> list[RenderableType]:
    """Every reward in a line, and what each entry of `rewards` may say."""
    table = plain_table("reward", "what it is worth")
    for reward in described:
        table.add_row(Text(reward["name"], style="bold"), Text(reward["summary"]))
    note = Text(
        "`posttrain rewards NAME` has its parameters and an example. A stage's `rewards` lists names, or mappings:"
    )
    return [table, note, fields_table("rewards", entry)]


def reward_tables(reward: Mapping[str, Any]) -> list[RenderableType]:
    """One reward with its parameters, for a recipe, and on a row."""
    head = Text.assemble((reward["name"], "bold"), f": {reward['summary']}")
    more = [Text(reward["more"])] if reward["more"] else []
    fields = [fields_table("parameters", reward["fields"])] if reward["fields"] else [Text("It takes no parameters.")]
    example = reward["example"]
    row = plain_table("example", "")
    told = {name: value for name, value in example.items() if name not in ("row", "why", "score")}
    for name, value in {**example["row"], **told}.items():
        row.add_row(Text(name), Text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    row.add_row(Text("score", style="bold"), Text(f"{example['score']:g}: {example['why']}"))
    recipe = Text(f"in a stage's `with`:\n{reward['recipe'].rstrip()}")
    return [head, *more, *fields, recipe, row]
