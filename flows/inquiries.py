"""The commands that ask about the past: why, and more. Each takes the parsed options and gives the exit status."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from artifacts.errors import Problem, RequestError
from flows.request import open_named, plan_named, print_json


def why(options: Namespace) -> int:
    """`posttrain why`"""
    from flows.which_run import newest_with, read_run
    from flows.why import why_in_plan, why_in_run

    if options.set and options.recipe is None:
        what = "changes a recipe, and none is named: give --recipe too"
        raise RequestError([Problem(f"--set {options.set[0]}", what)])
    if options.run is not None and options.recipe is not None:
        what = "asks what a run did, and --recipe what one would do: leave one out"
        raise RequestError([Problem(f"--run {options.run}", what)])
    if options.recipe is not None:
        found = why_in_plan(plan_named(options), options.stage)
    else:
        store = open_named(options)
        run = newest_with(store, options.stage) if options.run is None else read_run(store, options.run)
        found = why_in_run(store, run, options.stage)
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
    from flows.many_runs import compare_many, runs_named

    store = open_named(options)
    named = runs_named(store, options.runs)
    if named.are_two:
        found = compare_runs(store, *named.runs)
        described = found.to_json()
    else:
        many = compare_many(store, named)
        described = many.to_json()
    if options.json:
        print_json(described)
        return 0
    from flows.tables import show

    if named.are_two:
        from flows.inquiry_tables import diff_tables

        show(*diff_tables(found))
    else:
        from flows.standings_table import many_tables

        show(*many_tables(many, named.sweep))
    return 0


def lineage(options: Namespace) -> int:
    """`posttrain lineage`"""
    from flows.ancestry import Ancestry

    store = open_named(options)
    artifact, ancestry = store.find(options.artifact), Ancestry(store)
    down, up = ancestry.down(artifact), ancestry.up(artifact)
    if options.json:
        print_json({"made_of": down.to_json(), "used_by": up.to_json("used_by")["used_by"]})
    else:
        from flows.tables import show
        from flows.trace_tables import lineage_tables

        show(*lineage_tables(down, up))
    return 0


def trace(options: Namespace) -> int:
    """`posttrain trace`"""
    from flows.trace import Wanted
    from flows.trace import trace as trace_score

    store = open_named(options)
    wanted = Wanted(options.wrong, options.right, options.row, options.limit, options.rows)
    found = trace_score(store, store.find(options.evaluation), options.metric, wanted)
    if options.json:
        print_json(found.to_json())
    else:
        from flows.tables import show
        from flows.trace_tables import trace_tables

        show(*trace_tables(found))
    return 1 if found.agrees is False else 0


def tokens(options: Namespace) -> int:
    """`posttrain tokens`"""
    from flows.tokens import read_tokens

    found = read_tokens(plan_named(options), options.stage, input=options.input, row=options.row, limit=options.limit)
    if options.json:
        print_json(found.to_json())
    else:
        from flows.tables import show
        from flows.tokens_table import tokens_tables

        show(*tokens_tables(found, one_a_line=options.ids))
    return 0


def ledger(options: Namespace) -> int:
    """`posttrain ledger`"""
    from flows.costs import bill

    found = bill(open_named(options), options.of)
    if options.json:
        print_json(found.to_json())
    else:
        from flows.cost_table import cost_tables
        from flows.tables import show

        show(*cost_tables(found))
    return 0


def reproduce(options: Namespace) -> int:
    """`posttrain reproduce`"""
    import shutil

    from flows.recipe_files import SHIPPED
    from flows.reproduce import reproduce as run_again
    from flows.reproduce_terminal import following, reproduction_tables
    from flows.run import new_run_id

    store = open_named(options)
    artifact = store.find(options.artifact)
    folder = options.folder or store.scratch / f"reproduce-{artifact.digest[:8]}-{new_run_id()}"
    with following(artifact) as on_event:
        found = run_again(store, artifact, folder, files=[*(options.files or [Path.cwd()]), SHIPPED], on_event=on_event)
    if found.same and options.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print_json(found.to_json())
    else:
        from flows.tables import show

        show(*reproduction_tables(found))
    return 0 if found.same else 1


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    command.__name__: command for command in (why, diff, reproduce, lineage, trace, tokens, ledger)
}
