"""What a scheduled run would end at and can be known now: looked for where the run will be.

The plan says what is wrong with recipe, inputs, data and packages. Here user's code is loaded, keys are looked for,
first rows are converted and the store is written to, by the interpreters and in the environment of the stages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from artifacts import Store, open_store, require_shared
from artifacts.errors import Problem, RequestError, StoreError
from flows.command import stage_variables
from flows.plan import Plan, plan_reading
from flows.recipe import RecipeStage, read_recipe

SECONDS = 300.0
"""For the code of the user's that is loaded, and what it loads."""
_PROBE = "work/check"
"""One key for all, so that a check that is killed between the two leaves no more than this."""


def check(recipe: str, settings: Sequence[str], store: str) -> Plan:
    """The plan of a run with these settings. Raises RequestError with everything that is known to end it."""
    opened = _opened(store)
    made = plan_reading(read_recipe(recipe, settings), opened)
    if problems := [*_unwritable(opened), *_at_beginnings(made)]:
        raise RequestError(problems)
    return made


def _opened(store: str) -> Store:
    try:
        opened = open_store(store)
    except StoreError as error:
        raise RequestError([Problem(f"store {store}", str(error))]) from error
    require_shared(opened)
    return opened


def _unwritable(store: Store) -> Iterator[Problem]:
    try:
        store.files.write(_PROBE, b"may be deleted")
        store.files.delete(_PROBE)
    except StoreError as error:
        yield Problem(f"store {store.url}", f"nothing can be written: {error}")


def _at_beginnings(plan: Plan) -> Iterator[Problem]:
    """Of all stages that may run, those of one interpreter and environment in one process."""
    alike: dict[tuple[str, tuple[tuple[str, str], ...]], list[RecipeStage]] = defaultdict(list)
    for name, stage in plan.recipe.stages.items():
        if plan.decisions[name].state in ("run", "resume", "may_run"):
            alike[stage.launch.python or sys.executable, tuple(sorted(stage.launch.env.items()))].append(stage)
    for (python, env), stages in alike.items():
        yield from _asked(plan, python, dict(env), stages)


def _asked(plan: Plan, python: str, env: dict[str, str], stages: Sequence[RecipeStage]) -> Iterator[Problem]:
    entries = [
        {"name": stage.name, "uses": stage.uses.name, "config": stage.config.model_dump(mode="json")}
        for stage in stages
    ]
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "asked.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(entries), encoding="utf-8")
        command = [python, "-m", "stages.beginnings", str(asked), str(answer)]
        environment = {**os.environ, **stage_variables(1), **env}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            yield Problem(_named(stages), f"what they begin with took more than {SECONDS:.0f} s to load")
            return
        except OSError as error:
            yield Problem(_named(stages), f"launch.python {python} cannot be started: {error}")
            return
        if done.returncode != 0 or not answer.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            yield Problem(_named(stages), f"{python} cannot begin them: {last}")
            return
        for name, where, what in json.loads(answer.read_text(encoding="utf-8")):
            place = tuple(int(part) if part.isdecimal() else part for part in where.split("."))
            yield plan.recipe.problem(("stages", name, *place), what)


def _named(stages: Sequence[RecipeStage]) -> str:
    return "stages " + ", ".join(stage.name for stage in stages)
