"""What a recipe may ask for of tools and environments."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from stages.identity import semantic_config
from stages.rl import Config, check

WIRED = frozenset({"model", "dataset"})
TOOL = "tests.rollouts.multi_turn.user_code:add"


def config(**settings: Any) -> Config:
    return Config.model_validate_json(json.dumps({"rewards": ["exact_match"], **settings}), strict=True)


REFUSED = [
    ({"max_tool_calling_iterations": 2}, "max_tool_calling_iterations is given, but there are no tools"),
    ({"tools": ["python"]}, "tools names 'python', but no tool is built in; give file.py:name"),
    ({"tools": [TOOL, TOOL]}, f"tools names '{TOOL}' twice; leave one out"),
    ({"environment": "openenv"}, "environment 'openenv' has no file; give file.py:name, or a mapping for openenv"),
    ({"rewards": ["environment"]}, "rewards names environment, but there is none; give environment: file.py:name"),
]


@pytest.mark.parametrize(("settings", "problem"), REFUSED)
def test_refused_with_the_recipe(settings: dict[str, Any], problem: str) -> None:
    assert problem in check(config(**settings), WIRED)


def test_recorded_rollouts_are_not_answered() -> None:
    settings = config(rewards=[], tools=[TOOL], environment="env.py:Game")
    said = "is of sampling; input rollouts is taken as it was recorded"
    assert {f"tools {said}", f"environment {said}"} <= set(check(settings, frozenset({"model", "rollouts"})))


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"name": "openenv", "parameters": {"environment": "x"}}, "environment openenv needs url"),
        ({"name": "env.py:Game", "url": "http://127.0.0.1:1"}, "url is of environment openenv, found env.py:Game"),
        ({"name": "game"}, "no built-in environment 'game'; there is openenv, or give file.py:name"),
        ({"name": "openenv", "url": "u"}, "parameters of openenv: environment: Field required"),
    ],
)
def test_environments_are_checked(environment: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        config(environment=environment)


def test_the_address_of_a_server_is_no_part_of_the_result() -> None:
    def identity(url: str, name: str) -> Any:
        environment = {"name": "openenv", "url": url, "parameters": {"environment": name}}
        return semantic_config(config(environment=environment))["environment"]

    assert identity("http://a", "chess") == identity("http://b", "chess") != identity("http://a", "go")


def test_the_source_of_tools_and_environments_is() -> None:
    here = semantic_config(config(tools=[TOOL], environment="tests.rollouts.multi_turn.user_code:Echo"))
    assert here["tools"][0]["function"] == "add" and len(here["tools"][0]["sha256"]) == 64
    assert here["environment"]["sha256"] == here["tools"][0]["sha256"]
