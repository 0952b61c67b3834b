"""A stage `make` that joins texts, for tests of the pipeline; its process is in `pipeline_fakes`."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

from artifacts import Store, open_store
from flows.plan import Plan, plan
from flows.recipe import Recipe
from stages import stage as declared
from stages.stage import Config, Input, Stage, operational

HERE = Path(__file__).parent


class MakeConfig(Config):
    text: str = ""
    """What is written."""
    fail: str = operational("")
    """Fail with this message."""
    taken: str = operational("")
    """Fail once, as if a port were taken; this file then says that it was."""
    refuses: str = operational("")
    """Fail where this is the text."""
    until: str = operational("")
    """Wait for this file; `{text}` in its name is the text."""
    log: str = operational("")
    """Append the stage's name to this file: which processes ran."""


def _never(context: object) -> None:
    raise AssertionError("runs in a process of its own")


MAKE = Stage(
    name="make",
    version=1,
    config=MakeConfig,
    inputs={"source": Input(("dataset",), required=False, many=True)},
    outputs={"dataset": "dataset"},
    run=_never,
    main_metric="length",
)


def install() -> None:
    """Make `make` the only stage there is, in this process."""
    declared.STAGES = ("make",)
    module = types.ModuleType("stages.make")
    module.STAGE = MAKE
    sys.modules["stages.make"] = module


class World:
    """A recipe of three stages in a row and one beside them, in a folder with its store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store: Store = open_store(str(folder / "store"))

    def values(self) -> dict[str, Any]:
        """What the recipe's file would hold."""
        log = str(self.folder / "log")
        path = os.pathsep.join([str(HERE / "pipeline_fakes"), str(HERE.parent.parent)])
        stages: dict[str, Any] = {
            "one": {"uses": "make", "with": {"text": "1", "log": log}},
            "two": {"uses": "make", "inputs": {"source": ["one"]}, "with": {"text": "2", "log": log}},
            "three": {"uses": "make", "inputs": {"source": ["two"]}, "with": {"text": "3", "log": log}},
            "beside": {"uses": "make", "with": {"text": "b", "log": log}},
        }
        return {"name": "small", "parallel": 2, "launch": {"env": {"PYTHONPATH": path}}, "stages": stages}

    def recipe(self, *overrides: str) -> Recipe:
        return Recipe.from_dict(self.values(), overrides)

    def file(self, **more: Any) -> str:
        """The recipe as a file, with more keys or others."""
        path = self.folder / "small.yaml"
        path.write_text(json.dumps(self.values() | more))
        return str(path)

    def plan(self, *overrides: str, **options: Any) -> Plan:
        return plan(self.recipe(*overrides), self.store, **options)

    def ran(self) -> list[str]:
        """The stages that had a process since the last call, in the order of their start."""
        path = self.folder / "log"
        names = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return names
