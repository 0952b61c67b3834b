"""What the commands of the command line do. Each takes the parsed options and gives the exit status."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable

from artifacts.errors import RequestError
from flows import inquiries, operations, store_care
from flows.request import open_named as _open
from flows.request import plan_named as _plan
from flows.request import print_json as _print_json
from flows.request import refused


def run(options: Namespace) -> int:
    """`posttrain run`"""
    made = _plan(options, here=True)
    from flows.pipeline import run_pipeline
    from flows.terminal import Terminal

    with Terminal(json=options.json) as terminal:
        payload = run_pipeline(made, terminal)
    if options.json:
        _print_json(payload)
    return 0 if payload["state"] == "ok" else 1


def sweep(options: Namespace) -> int:
    """`posttrain sweep`"""
    from flows.sweep import plan_sweep, request_of
    from flows.sweep_report import keep_page
    from flows.sweep_terminal import SweepTerminal
    from flows.sweeping import run_sweep

    store = _open(options)
    with refused(options):
        made = plan_sweep(request_of(options), store)
    with SweepTerminal(made, json=options.json) as terminal:
        payload = run_sweep(made, terminal)
        page = terminal.page(lambda: keep_page(store, payload))
    if options.json:
        _print_json({**payload, "report": page})
    return 0 if payload["state"] == "ok" else 1


def plan(options: Namespace) -> int:
    """`posttrain plan`"""
    made = _plan(options)
    from flows.plan_checks import lacking_here

    predicted, lacking = {}, lacking_here(made)
    if options.memory or options.memory_gb is not None:
        from flows.machine import Machine
        from flows.memory import predict

        predicted = predict(made, Machine.here(options.memory_gb))
    if options.json:
        described = made.to_json()
        for name, prediction in predicted.items():
            described["stages"][name]["memory"] = prediction.to_json()
        described["lacking"] = [{"where": problem.where, "what": problem.what} for problem in lacking]
        _print_json(described)
    else:
        from flows.decision import left_out_line
        from flows.memory_table import memory_table
        from flows.tables import lacking_lines, plan_table, show

        left_out = left_out_line(made.decisions)
        parts = [plan_table(made), left_out, lacking_lines(lacking), memory_table(predicted) if predicted else None]
        show(*(part for part in parts if part))
    return 0


def show(options: Namespace) -> int:
    """`posttrain show`"""
    store = _open(options)
    artifact = store.find(options.artifact)
    manifest = store.manifest(artifact)
    description = {
        "id": artifact.id,
        "kind": artifact.kind,
        "aliases": [name for name, named in store.aliases().items() if named == artifact],
        "producer": dict(manifest.producer),
        "metrics": dict(manifest.metrics),
        "counts": dict(manifest.counts),
        "versions": dict(manifest.versions),
        "files": [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in manifest.files],
        "lineage": store.lineage(artifact),
    }
    if options.json:
        _print_json(description)
    else:
        from flows import tables

        tables.show(*tables.description_tables(description))
    return 0


def path(options: Namespace) -> int:
    """`posttrain path`"""
    store = _open(options)
    artifact = store.find(options.artifact)
    folder = store.materialize(artifact)
    if options.json:
        _print_json({"id": artifact.id, "kind": artifact.kind, "path": str(folder)})
    else:
        print(folder)
    return 0


def report(options: Namespace) -> int:
    """`posttrain report`"""
    from flows.report import place_of, rendered_run, write_report
    from flows.sweep_report import rendered_sweep, write_sweep_report
    from flows.which_run import named

    store = _open(options)
    kind, name = named(store, options.run)
    output = place_of(options.output, name)
    if output is None:
        if options.json:
            raise RequestError("-o - writes the page to stdout, where --json writes its object; give one of them")
        print({"run": rendered_run, "sweep": rendered_sweep}[kind](store, name))
        return 0
    made = not output.parent.exists()
    {"run": write_report, "sweep": write_sweep_report}[kind](store, name, output)
    if made:
        print(f"made the folder {output.parent}", file=sys.stderr)
    if options.json:
        _print_json({kind: name, "report": str(output)})
    else:
        print(output)
    return 0


def stages(options: Namespace) -> int:
    """`posttrain stages`"""
    from flows.describe import describe_stage
    from stages import stage as registry

    names = registry.STAGES if options.name is None else (options.name,)
    described = [describe_stage(registry.load_stage(name)) for name in names]
    if options.json:
        _print_json({entry["name"]: entry for entry in described})
    else:
        from flows import tables

        tables.show(*(tables.stage_tables(described[0]) if options.name else [tables.stages_table(described)]))
    return 0


def rewards(options: Namespace) -> int:
    """`posttrain rewards`"""
    from dataclasses import asdict

    from flows.describe_reward import describe_reward, entry_rows
    from stages.rollouts.reward_spec import REWARDS

    described = [describe_reward(name) for name in (REWARDS if options.name is None else (options.name,))]
    if options.json:
        _print_json({entry["name"]: entry for entry in described})
    else:
        from flows import tables
        from flows.reward_tables import reward_tables, rewards_tables

        shown = reward_tables(described[0]) if options.name else rewards_tables(described, map(asdict, entry_rows()))
        tables.show(*shown)
    return 0


COMMANDS: dict[str, Callable[[Namespace], int]] = (
    {command.__name__: command for command in (run, sweep, plan, show, path, report, stages, rewards)}
    | inquiries.COMMANDS
    | operations.COMMANDS
    | store_care.COMMANDS
)
