"""The commands that ask about the past: why, and more. Each takes the parsed options and gives the exit status."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from flows.request import open_named, plan_named, print_json


def why(options: Namespace) -> int:
    """`posttrain why`"""
    from flows.which_run import read_run
    from flows.why import why_in_plan, why_in_run

    if options.recipe is not None:
        found = why_in_plan(plan_named(options), options.stage)
    else:
        store = open_named(options)
        found = why_in_run(store, read_run(store, options.run), options.stage)
    if options.json:
        print_json(found.to_json())
    else:
        from flows.inquiry_tables import why_tables
        from flows.tables import show

        show(*why_tables(found))
    return 0


def diff(options: Namespace) -> int:
    """`posttrain diff`"""
    from flows.compare import compare_runs
    from flows.which_run import read_run

    store = open_named(options)
    found = compare_runs(store, read_run(store, options.run), read_run(store, options.other))
    if options.json:
        print_json(found.to_json())
    else:
        from flows.inquiry_tables import diff_tables
        from flows.tables import show

        show(*diff_tables(found))
    return 0


COMMANDS: dict[str, Callable[[Namespace], int]] = {command.__name__: command for command in (why, diff)}
