"""What `posttrain stages NAME` says of the fields of a Config."""

from pydantic import BaseModel

from flows.fields import field_rows
from stages.rl import Config


class Engine(BaseModel):
    share: float = 0.3
    name: str = "x"


class Outer(BaseModel):
    engine: Engine = Engine(share=0.5)
    spare: Engine | None = None
    needed: Engine


def test_defaults_of_nested_fields_are_said_once_and_as_they_hold() -> None:
    shown = [(row.name, row.default) for row in field_rows(Outer)]
    assert shown == [
        ("engine", "as below"),
        ("engine.share", "0.5"),  # what the outer field has, not what the class would
        ("engine.name", "x"),
        ("spare", "null"),
        ("spare.share", "0.3"),
        ("spare.name", "x"),
        ("needed", "required"),
        ("needed.share", "0.3"),
        ("needed.name", "x"),
    ]


def test_no_default_of_rl_repeats_those_of_its_fields() -> None:
    assert [row.name for row in field_rows(Config) if row.default.startswith("{") and row.default != "{}"] == []
