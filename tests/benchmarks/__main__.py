"""Benchmarks of the training engine: `python -m tests.benchmarks --stage dpo --shape P384C32 --rounds 5`.

posttrain (`ours`) against a plain loop on transformers (`plain`) and TRL 1.16.0 at its defaults (`trl-default`) and
at its best settings for the case (`trl-best`): fresh process each, same weights, rows, batches and steps, numbers
compared at every step before any time counts, contestants in turn, medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.benchmarks.cases import GPU_MATRIX, MATRIX, MODELS, STEPS, Case, case_of
from tests.benchmarks.growth import SERIES, slope
from tests.benchmarks.parity import ParityError
from tests.benchmarks.recorder import CLOCKS
from tests.benchmarks.report import (
    COLUMNS,
    GOAL_COLUMNS,
    append_section,
    commit,
    goal_lines,
    lines,
    machine,
    markdown_table,
    summary,
    terminal_table,
)
from tests.benchmarks.rounds import BenchmarkError, Measured, measure, require_known
from tests.benchmarks.worker import CONTESTANTS

Titled = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Header and cells of a table."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--stage", choices=STEPS)
    what.add_argument("--all", action="store_true", help="the published matrix, with its goals")
    what.add_argument("--gpu", action="store_true", help="the matrix of real sizes, on one GPU of 140 GB")
    what.add_argument("--growth", choices=SERIES, help="how time and memory follow one size")
    parser.add_argument("--shape", default="P128C128", help="mean tokens of prompt and completion (default P128C128)")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--model", choices=MODELS, default="S")
    parser.add_argument("--bf16", action="store_true", help="passes in bfloat16; what is trained stays float32")
    parser.add_argument("--lora-r", type=int, help="train adapters of this rank in place of the weights")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward pass")
    parser.add_argument("--group-size", type=int, help="completions of a prompt (grpo; default 8)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps of a run; the first 2 are not timed (default 10)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: processor time of all threads, for a machine that others use too; with --threads 1",
    )
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="figures on stdout, nothing else")
    parser.add_argument("--results", type=Path, metavar="FILE", help="append a dated section to this Markdown file")
    parser.add_argument("--note", default="", help="a line for that section")
    return parser.parse_args(arguments)


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """What the command line asks to measure."""
    if arguments.all:
        return [goal.case for goal in MATRIX]
    if arguments.gpu:
        return list(GPU_MATRIX)
    if arguments.growth:
        return [case for _, case in SERIES[arguments.growth](arguments.steps)]
    return [
        case_of(
            arguments.stage,
            arguments.shape,
            vocabulary=arguments.vocabulary,
            model=arguments.model,
            group_size=arguments.group_size,
            steps=arguments.steps,
            bf16=arguments.bf16,
            lora_r=arguments.lora_r,
            checkpointing=arguments.checkpointing,
        )
    ]


def main(given: Sequence[str]) -> int:
    """0: measured; 1: a contestant failed or computes something else; 2: wrong request."""
    arguments = parse(given)
    console = Console(stderr=arguments.json, highlight=False, width=None if sys.stdout.isatty() else 200)
    contestants = [name.strip() for name in arguments.contestants.split(",")]
    try:
        require_known(contestants)
        cases = cases_of(arguments)
    except ValueError as error:
        console.print(str(error), markup=False)
        return 2
    measured: list[Measured] = []
    failure: Exception | None = None
    try:
        for case in cases:
            measured.append(
                measure(
                    case,
                    contestants,
                    arguments.rounds,
                    threads=arguments.threads,
                    clock=arguments.clock,
                    say=lambda text: console.print(text, style="dim", markup=False),
                )
            )
    except (BenchmarkError, ParityError) as error:
        failure = error
    except KeyboardInterrupt:
        failure = BenchmarkError(f"interrupted after {len(measured)} of {len(cases)} cases")
    if measured:
        command = shlex.join(["python", "-m", "tests.benchmarks", *_without_results(given)])
        publish(console, arguments, command, measured)
    if failure is not None:
        console.print(str(failure), markup=False)
        return 1
    return 0


def publish(console: Console, arguments: argparse.Namespace, command: str, measured: Sequence[Measured]) -> None:
    """To the terminal, to stdout as JSON, to the file of results."""
    summaries = [summary(one) for one in measured]
    tables = tables_of(arguments, summaries)
    for header, cells in tables:
        console.print(terminal_table(header, cells))
    if arguments.json:
        print(json.dumps(summaries, indent=1))
    if arguments.results:
        append_section(
            arguments.results,
            command,
            arguments.note,
            facts_of(arguments, measured),
            [markdown_table(header, cells) for header, cells in tables],
        )


def tables_of(arguments: argparse.Namespace, summaries: list[dict[str, Any]]) -> list[Titled]:
    """Every figure; the goals of the matrix; the slopes of a series."""
    tables: list[Titled] = [(COLUMNS, lines(summaries))]
    if arguments.all and "ours" in summaries[0]["contestants"]:
        tables.append((GOAL_COLUMNS, goal_lines(MATRIX[: len(summaries)], summaries)))
    if arguments.growth and len(summaries) > 1:
        sizes = [size for size, _ in SERIES[arguments.growth](arguments.steps)][: len(summaries)]
        tables.append(
            (
                ("contestant", f"time grows with {arguments.growth} to the", "working memory to the"),
                [
                    (
                        name,
                        f"{slope(sizes, [one['contestants'][name]['step_seconds'] for one in summaries]):.2f}",
                        f"{slope(sizes, [one['contestants'][name]['working_memory_mib'] for one in summaries]):.2f}",
                    )
                    for name in summaries[0]["contestants"]
                ],
            )
        )
    return tables


def facts_of(arguments: argparse.Namespace, measured: Sequence[Measured]) -> list[str]:
    """What a reader needs to judge the numbers."""
    versions = measured[0].versions
    loads = [load for one in measured for load in one.loads]
    stolen = max(runs.most_stolen() for one in measured for runs in one.runs.values())
    methods = {runs.results[0]["memory_method"] for one in measured for runs in one.runs.values()}
    rates = [f"{one.case.name}: {' and '.join(_rates(one))}" for one in measured]
    too_large = [f"{name} on {one.case.name}" for one in measured for name in one.too_large]
    kind = "bfloat16" if measured[0].case.bf16 else "float32"
    return [
        machine(),
        ", ".join([f"posttrain at {commit()}", *(f"{name} {version}" for name, version in versions.items())]),
        f"{kind}, {arguments.threads} threads, {arguments.clock} clock, {arguments.rounds} rounds, "
        f"load average before a round {min(loads):.1f} to {max(loads):.1f}, "
        f"processor time that the host took from a run at most {stolen:.1%}",
        f"working memory: {'; '.join(sorted(methods))}, minus what was held before the first step",
        "matrix rate of the floor (torch.mm's best), and oneDNN's, measured in the same rounds: " + "; ".join(rates),
        *([f"the GPU's memory was not enough for {', '.join(too_large)}"] if too_large else []),
    ]


def _rates(measured: Measured) -> list[str]:
    found = [measured.best_rate, measured.best_onednn_rate]
    return [f"{rate[1] / 1e9:.0f} GFLOP/s, product {rate[0]}" for rate in found if rate is not None]


def _without_results(given: Sequence[str]) -> list[str]:
    """The command as another person would give it."""
    kept, skip = [], False
    for word in given:
        skip_this, skip = skip, word in ("--results", "--note")
        if not (skip_this or skip):
            kept.append(word)
    return kept


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
