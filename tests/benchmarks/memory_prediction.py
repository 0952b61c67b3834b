"""Predicted against measured working memory: `python -m tests.benchmarks.memory_prediction [--rounds 3]`.

What `posttrain plan --memory` computes, given the tokens that a case's micro-batches really have, beside the peak
resident memory of the engine on the same rows: minus what the process held just before its first step, plus the
weights of its models.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from stages.training.batch import Branch, Group, plan_micro_batches
from stages.training.memory import scoring, training_step
from stages.training.memory_head import HeadUse
from stages.training.memory_phase import Phase
from stages.training.memory_request import Passes
from stages.training.memory_shape import ModelShape, read_shape
from stages.training.memory_training import Setup, Training
from tests.benchmarks.cases import MATRIX, STEPS, TAUGHT, Architecture, Case, case_of, teacher_of
from tests.benchmarks.models import qwen3_config
from tests.benchmarks.report import append_section, commit, machine, markdown_table, terminal_table
from tests.benchmarks.rounds import Processes
from tests.benchmarks.rows import Row, batches, make_rows

WITHIN = 0.15
"""The aim: predictions are off by no more than this share."""
BUDGET = 8192
"""micro_batch_tokens of the stages' defaults, which the engine's contestant runs with."""
NOT_MEASURED = ("process", "checkpoint")
"""Parts of a prediction that are there before the first step, or not at all in a benchmark."""


@dataclass(frozen=True)
class Compared:
    """One case. Bytes."""

    case: Case
    predicted: Phase
    measured: list[float]

    @property
    def expected(self) -> float:
        """The prediction of what is measured."""
        return sum(size for part, size in self.predicted.parts.items() if _counts(part))

    @property
    def error(self) -> float:
        """Prediction over measurement, less one."""
        return self.expected / median(self.measured) - 1


def predict(case: Case) -> Phase:
    """The largest of all steps."""
    return max((_step(case, rows) for rows in batches(case, make_rows(case))), key=lambda phase: phase.total)


def _step(case: Case, rows: Sequence[Row]) -> Phase:
    shape = shape_of(case.architecture, case)
    groups = [Group(row.row_id, row.prompt, tuple(map(Branch, row.completions))) for row in rows]
    plan = plan_micro_batches(groups, BUDGET, share_prefixes=True)
    largest = max((([rows[i] for i in batch]) for batch in plan), key=lambda batch: sum(map(_tokens, batch)))
    completions = sum(len(row.completions) for row in largest)
    asked = completions if case.stage == "reward" else sum(row.completion_tokens for row in largest)
    work = Passes(sum(map(_tokens, largest)), asked, max(row.longest for row in largest), len(plan))
    if case.stage == "reference":
        return scoring(shape, Setup(), work)
    teacher = shape_of(teacher_of(case.architecture), case) if case.stage in TAUGHT else None
    use = HeadUse(together=case.stage == "dpo", teacher=teacher)
    return training_step(Training(shape, Setup()), work, use, reference=_of_teacher(case))


def _of_teacher(case: Case) -> float:
    """Bytes of a teacher that is there: the whole, or its head."""
    shape = shape_of(teacher_of(case.architecture), case)
    held = {"distill": shape.parameters, "distill_kept": shape.vocabulary * shape.hidden}
    return 4.0 * held.get(case.stage, 0)


def _tokens(row: Row) -> int:
    return len(row.prompt) + row.completion_tokens


def shape_of(architecture: Architecture, case: Case) -> ModelShape:
    """A case's model as the prediction sees it."""
    kind = "Qwen3ForSequenceClassification" if case.stage == "reward" else "Qwen3ForCausalLM"
    config = json.loads(qwen3_config(architecture, case.vocabulary).to_json_string())
    return read_shape({**config, "architectures": [kind]})


def resident(case: Case) -> float:
    """The weights that are there before the first step."""
    return 4.0 * shape_of(case.architecture, case).parameters + _of_teacher(case)


def compare(case: Case, rounds: int, threads: int) -> Compared:
    """The engine's own processes, as the benchmarks start them."""
    measured = []
    with TemporaryDirectory(prefix="posttrain-memory-") as name:
        processes = Processes(case, Path(name), threads)
        processes.run("prepare")
        for _ in range(rounds):
            measured.append(resident(case) + processes.run("ours")["working_memory"])
    return Compared(case, predict(case), measured)


COLUMNS = ("case", "predicted MB", "measured MB", "error", "of the prediction")


def lines(found: Sequence[Compared]) -> list[tuple[str, ...]]:
    """Cells under COLUMNS, a line a case."""
    return [
        (
            one.case.name,
            f"{one.expected / 1e6:.0f}",
            f"{median(one.measured) / 1e6:.0f}",
            f"{one.error:+.1%}",
            ", ".join(f"{part} {size / 1e6:.0f}" for part, size in one.predicted.parts.items() if _counts(part)),
        )
        for one in found
    ]


def _counts(part: str) -> bool:
    return part not in NOT_MEASURED


def publish(found: Sequence[Compared], options: argparse.Namespace, given: Sequence[str]) -> None:
    """A section of the results."""
    words = [word for word in given if word not in ("--results", str(options.results))]
    append_section(
        options.results,
        shlex.join(["python", "-m", "tests.benchmarks.memory_prediction", *words]),
        f"Predicted against measured working memory; the aim is {WITHIN:.0%}.",
        [machine(), f"posttrain at {commit()}, {options.rounds} rounds, {options.threads} threads"],
        [markdown_table(COLUMNS, lines(found))],
    )


def to_json(found: Sequence[Compared]) -> list[dict[str, Any]]:
    """All figures."""
    return [
        {
            "case": one.case.name,
            "predicted": one.expected,
            "measured": one.measured,
            "error": one.error,
            "phase": one.predicted.name,
            "parts": dict(one.predicted.parts),
        }
        for one in found
    ]


def main(arguments: Sequence[str]) -> int:
    """Exit status 1 where a prediction is off by more than the aim."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory_prediction")
    parser.add_argument("--stage", choices=STEPS, help="one case instead of the published matrix")
    parser.add_argument("--shape", default="P128C128")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--results", type=Path, metavar="FILE", help="append a dated section to this Markdown file")
    options = parser.parse_args(arguments)
    one = case_of(options.stage, options.shape, vocabulary=options.vocabulary) if options.stage else None
    cases = [goal.case for goal in MATRIX] if one is None else [one]
    found = [compare(case, options.rounds, options.threads) for case in cases]
    if options.json:
        print(json.dumps(to_json(found), indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(terminal_table(COLUMNS, lines(found)))
    if options.results:
        publish(found, options, arguments)
    return int(any(abs(one.error) > WITHIN for one in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
