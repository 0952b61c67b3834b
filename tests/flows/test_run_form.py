"""What the run form of a deployed recipe takes, by the validator that Prefect's server uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.schema_tools.validation import ValidationError, validate

from flows.prefect_deploy import Deployable
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
