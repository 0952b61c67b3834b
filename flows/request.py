"""What every command of the command line begins and ends with: its store, its plan, its JSON."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from artifacts.errors import Problem, RequestError, StoreError
from stages.visible import visible

if TYPE_CHECKING:
    from artifacts import Store
    from flows.plan import Plan


def plan_named(options: Namespace) -> Plan:
    """The plan of the recipe that the options name, with what they select where they can. Raises RequestError."""
    from flows.plan import plan as make_plan
    from flows.recipe import Recipe

    recipe = Recipe.load(options.recipe, options.set)
    store = open_named(options)
    given = {name: getattr(options, name, []) for name in ("only", "from", "until", "force")}
    with refused(options):
        return make_plan(recipe, store, start=given.pop("from"), **given)


def open_named(options: Namespace) -> Store:
    """The store that the options name. Raises RequestError where it does not answer, or is only this process's."""
    from artifacts import open_store, require_shared

    with refused(options):
        store = open_store(options.store)
    require_shared(store)
    return store


@contextmanager
def refused(options: Namespace) -> Iterator[None]:
    """A store that does not answer before anything was started makes the request wrong, not a stage fail."""
    try:
        yield
    except StoreError as error:
        where = "POSTTRAIN_STORE" if options.store is None else f"--store {options.store}"
        raise RequestError([Problem(where, str(error))]) from error


def print_json(value: Any) -> None:
    """One JSON object for scripts."""
    print(visible(json.dumps(value, indent=1, ensure_ascii=False)))
