"""What the run form of a deployed recipe takes, by the validator that Prefect's server uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.schema_tools.validation import ValidationError, validate

from flows.prefect_deploy import Deployable
from flows.run_form import GIVEN
from tests.tiny_recipe import write_recipe


@pytest.fixture
def deployable(tmp_path: Path) -> Deployable:
    path = write_recipe(tmp_path, {})
    values = json.loads(path.read_text())
    values["stages"]["rows"]["with"]["limit"] = "${limit}"
    path.write_text(json.dumps({**values, "parameters": {"limit": 50}}))
    return Deployable.read(str(path), ["limit=40", "base.hidden_size=16"])


def test_settings_of_parameters_become_the_forms_defaults(deployable: Deployable) -> None:
    values = deployable.values("a store")
    assert (values["parameters"], values["set"]) == ({"limit": 40}, ["base.hidden_size=16"])


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({}, True),
        ({"only": ["rows"], "force": ["rows"]}, True),
        ({"parameters": {"limit": 7}}, True),
        ({"only": ["rwos"]}, False),
        ({"parameters": {"lmit": 7, "limit": 7}}, False),
        ({"parameters": {}}, False),  # what is left out would silently fall back to the recipe's own
        ({"parameters": {"limit": "many"}}, False),
        ({"parameters": {"limit": 0}}, False),  # as the field takes it that it is written in
        ({"parameters": {"limit": 7.5}}, False),
        ({"wrong": 1}, False),
    ],
)
def test_what_the_form_takes(deployable: Deployable, changed: dict[str, Any], taken: bool) -> None:
    values = {**deployable.values("a store"), **changed}
    try:
        validate(values, deployable.schema("a store"), raise_on_error=True, preprocess=False, ignore_required=False)
    except ValidationError:
        assert not taken
    else:
        assert taken


def test_a_parameter_is_described_as_its_field_is(deployable: Deployable) -> None:
    form = deployable.schema("a store")["properties"]["parameters"]["properties"]["limit"]
    assert (form["type"], form["minimum"], form[GIVEN]) == ("integer", 1, True)
    assert form["description"] == (
        "rows.limit (a whole number of at least 1 or null): Keep so many rows, drawn by seed and content. "
        "Given to posttrain deploy; the recipe says 50."
    )


def test_a_choice_is_one_of_a_list_and_a_part_of_a_text_is_any_text(tmp_path: Path) -> None:
    """And what fields do not agree on is taken as the default is."""
    path = write_recipe(tmp_path, {})
    values = json.loads(path.read_text())
    values["parameters"] = {"kind": "prompt_completion", "file": "task", "many": 32}
    values["stages"]["rows"]["with"] |= {
        "type": "${kind}",
        "source": {"function": "${file}.py:rows"},
        "limit": "${many}",
    }
    values["stages"]["base"]["with"]["seed"] = "${many}"
    path.write_text(json.dumps(values))
    form = Deployable.read(str(path), []).schema("a store")["properties"]["parameters"]["properties"]
    assert form["kind"]["type"] == "string" and {"auto", "prompt_completion", "preference"} <= {*form["kind"]["enum"]}
    assert (form["file"]["type"], form["file"]["description"]) == ("string", "within rows.source.function")
    assert form["many"]["type"] == "number" and "minimum" not in form["many"]
    assert form["many"]["description"].startswith("rows.limit, base.seed (")
