"""A process that runs a small recipe again and again, as a user's own program would: `python soak_driver.py FOLDER`.

Each line of its stdin asks for a cycle, `{"kind": "miss", "text": "17"}`; each line of its stdout says how that ended.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from artifacts import Store, open_store
from artifacts.inspection import inspect
from artifacts.retention import Policy
from artifacts.survey import survey
from artifacts.sweep import sweep
from flows.listener import Silence
from flows.pipeline import run_pipeline
from flows.plan import plan
from flows.recipe import Recipe
from stages import stage as declared
from stages.stage import Config, Input, Stage, operational

HERE = Path(__file__).parent
LIBC = ctypes.CDLL(None)
TROUBLE = {"fail": "fail", "die": "die", "cancel": "wait"}
"""Kind of cycle -> what happens in the middle of the recipe's second stage; the other kinds go well."""


class WalkConfig(Config):
    text: str = ""
    """What the result follows from."""
    steps: int = 6
    """With a checkpoint after every second one."""
    trouble: str = operational("")
    """What happens in the middle: fail, die or wait."""


def _never(context: object) -> None:
    raise AssertionError("runs in a process of its own")


WALK = Stage(
    name="walk",
    version=1,
    config=WalkConfig,
    inputs={"source": Input(("dataset",), required=False, many=True)},
    outputs={"dataset": "dataset"},
    run=_never,
    main_metric="length",
)


def install() -> None:
    """Make `walk` the only stage there is, in this process."""
    declared.STAGES = ("walk",)
    module = types.ModuleType("stages.walk")
    module.STAGE = WALK  # type: ignore[attr-defined]
    sys.modules["stages.walk"] = module


def recipe(text: str, trouble: str) -> Recipe:
    path = os.pathsep.join([str(HERE / "soaking"), str(HERE.parents[1])])
    stages: dict[str, Any] = {
        "first": {"uses": "walk", "with": {"text": "always the same"}},
        "second": {"uses": "walk", "inputs": {"source": ["first"]}, "with": {"text": text, "trouble": trouble}},
        "third": {"uses": "walk", "inputs": {"source": ["second"]}, "with": {"text": "from the second"}},
    }
    return Recipe.from_dict({"name": "soak", "launch": {"env": {"PYTHONPATH": path}}, "stages": stages})


class CancelsInTheMiddle(Silence):
    """Interrupts this process, as Ctrl-C does, when a stage says that it is in the middle."""

    def event(self, name: str, event: Mapping[str, Any]) -> None:
        if event["kind"] == "log" and event["text"] == "in the middle":
            os.kill(os.getpid(), signal.SIGINT)


def cycle(store: Store, kind: str, text: str) -> dict[str, Any]:
    """One run; stage -> how it ended, and what it gave."""
    if kind == "upkeep":
        return upkeep(store)
    listener = CancelsInTheMiddle() if kind == "cancel" else None
    try:
        payload = run_pipeline(plan(recipe(text, TROUBLE.get(kind, "")), store), listener)
    except KeyboardInterrupt:
        return {"states": "interrupted"}
    entries = payload["stages"].items()
    return {
        "states": {name: entry["state"] for name, entry in entries},
        "outputs": {name: found["id"] for name, entry in entries for found in entry["outputs"].values()},
        "resumed_from": payload["stages"]["second"].get("resumed_from"),
    }


def upkeep(store: Store) -> dict[str, Any]:
    """Everything is verified, and what nothing needs is deleted."""
    problems = [problem for checked in inspect(store) for problem in checked.problems]
    policy = Policy(keep_runs=5, keep_days=0, grace_hours=0)
    return {"problems": problems, "deleted": len(sweep(store, survey(store, policy), f"gc {os.getpid()}").deleted)}


def give_back() -> None:
    """What is free goes back to the system, so that what is measured next is in use."""
    gc.collect()
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def main(folder: Path) -> None:
    # as a terminal starts it: background jobs of a shell, and what they start, ignore this signal
    signal.signal(signal.SIGINT, signal.default_int_handler)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is for the log
    install()
    store = open_store(str(folder / "store"))
    for line in sys.stdin:
        answer = cycle(store, **json.loads(line))
        give_back()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
