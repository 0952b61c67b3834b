"""What every command of the command line begins and ends with: its store, its plan, its JSON."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from artifacts.errors import Problem, RequestError, StoreError
from stages.visible import visible

if TYPE_CHECKING:
    from artifacts import Store
    from flows.plan import Plan


def plan_named(options: Namespace, *, here: bool = False) -> Plan:
    """The plan of the recipe that the options name, with what they select where they can; `here`: to run it, in this
    environment. Raises RequestError with every mistake that can be known by now."""
    from flows.plan import plan_reading
    from flows.recipe import read_recipe

    read = read_recipe(options.recipe, options.set)
    try:
        store = open_named(options)
    except RequestError as error:
        raise read.refusal(*error.problems) or error from error
    given = {name: getattr(options, name, []) for name in ("only", "from", "until", "force")}
    try:
        return plan_reading(read, store, start=given.pop("from"), here=here, **given)
    except StoreError as error:
        raise read.refusal(_unfit(options, error)) or error from error


def open_named(options: Namespace) -> Store:
    """The store that the options name. Raises RequestError where it does not answer, or is only this process's."""
    from artifacts import open_store, require_shared

    try:
        with refused(options):
            store = open_store(options.store)
        require_shared(store)
    except RequestError as error:
        raise RequestError([Problem(_store_named(options), problem.what) for problem in error.problems]) from error
    return store


@contextmanager
def refused(options: Namespace) -> Iterator[None]:
    """A store that does not answer before anything was started makes the request wrong, not a stage fail."""
    try:
        yield
    except StoreError as error:
        raise RequestError([_unfit(options, error)]) from error


def _unfit(options: Namespace, error: StoreError) -> Problem:
    return Problem(_store_named(options), str(error))


def _store_named(options: Namespace) -> str:
    """Who chose the store."""
    if options.store is not None:
        return f"--store {options.store}"
    return "POSTTRAIN_STORE" if os.environ.get("POSTTRAIN_STORE") else "the default store"


def print_json(value: Any) -> None:
    """One JSON object for scripts."""
    print(visible(json.dumps(value, indent=1, ensure_ascii=False)))
