"""Measurements as a table for the terminal, as Markdown for RESULTS.md, and as JSON."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.table import Table

from stages.nvml import gpus
from tests.benchmarks.cases import FLOOR_GOAL, Goal
from tests.benchmarks.rounds import Measured, Runs

MIB = 2**20


def summary(measured: Measured) -> dict[str, Any]:
    """All figures of a case as JSON values."""
    shape, rate = measured.best_rate
    return {
        "case": measured.case.name,
        "completion_tokens_per_step": measured.tokens,
        "floor": {
            "flops": measured.flops,
            "flops_per_second": rate,
            "product": shape,
            "all_products": {name: median(rates) for name, rates in measured.rates.items()},
            "step_seconds": measured.floor_seconds,
        },
        "load": measured.loads,
        "contestants": {name: _figures(measured, runs) for name, runs in measured.runs.items()},
    }


def _figures(measured: Measured, runs: Runs) -> dict[str, Any]:
    seconds, memory = runs.step_seconds(), runs.working_memory()
    figures = {
        "step_seconds": median(seconds),
        "step_seconds_quartiles": quartiles(seconds),
        "tokens_per_second": measured.tokens / median(seconds),
        "step_over_floor": median(seconds) / measured.floor_seconds,
        "step_over_onednn_floor": None
        if measured.onednn_floor_seconds is None
        else median(seconds) / measured.onednn_floor_seconds,
        "working_memory_mib": median(memory) / MIB,
        "working_memory_mib_quartiles": [value / MIB for value in quartiles(memory)],
        "memory_method": runs.results[0]["memory_method"],
        "parity": runs.parity,
    }
    if (ours := measured.runs.get("ours")) is not None and runs is not ours:
        figures["times_ours_tokens_per_second"] = median(seconds) / median(ours.step_seconds())
        figures["times_ours_working_memory"] = median(ours.working_memory()) / median(memory)
    return figures


def quartiles(values: Sequence[float]) -> list[float]:
    """First and third; of one value, that value."""
    if len(values) == 1:
        return [values[0], values[0]]
    first, _, third = quantiles(values, n=4, method="inclusive")
    return [first, third]


COLUMNS = (
    "case",
    "contestant",
    "s a step",
    "quartiles",
    "tokens/s",
    "ours is faster by",
    "working memory MiB",
    "ours takes",
    "step / floor",
    "at oneDNN's rate",
    "parity",
)


def lines(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Cells under COLUMNS, a line for every contestant of every case."""
    found: list[tuple[str, ...]] = []
    for one in summaries:
        for name, figures in one["contestants"].items():
            first, third = figures["step_seconds_quartiles"]
            faster, takes = figures.get("times_ours_tokens_per_second"), figures.get("times_ours_working_memory")
            found.append(
                (
                    one["case"],
                    name,
                    f"{figures['step_seconds']:.3f}",
                    f"{first:.3f} to {third:.3f}",
                    f"{figures['tokens_per_second']:,.0f}",
                    "" if faster is None else f"{faster:.2f}x",
                    f"{figures['working_memory_mib']:,.0f}",
                    "" if takes is None else f"{takes:.2f} of it",
                    f"{figures['step_over_floor']:.2f}",
                    "" if figures["step_over_onednn_floor"] is None else f"{figures['step_over_onednn_floor']:.2f}",
                    "" if figures["parity"] is None else f"{figures['parity']:.1g}",
                )
            )
    return found


def terminal_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    """Cells for rich."""
    table = Table(*header)
    for line in cells:
        table.add_row(*line)
    return table


def markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Cells as Markdown."""
    rows = [list(header), ["---"] * len(header), *map(list, cells)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


GOAL_COLUMNS = (
    "case",
    "tokens/s over plain",
    "goal",
    "over TRL",
    "goal",
    "memory of plain's",
    "goal",
    "step / floor",
    "goal",
)


def goal_lines(goals: Sequence[Goal], summaries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The published table: what was reached beside what is asked for; a missed goal in bold."""
    found: list[tuple[str, ...]] = []
    for goal, one in zip(goals, summaries, strict=True):
        contestants = one["contestants"]
        plain, trl = contestants.get("plain", {}), contestants.get("trl-best", {})
        memory = plain.get("times_ours_working_memory")
        floor = contestants["ours"]["step_over_floor"]
        found.append(
            (
                one["case"],
                _judged(plain.get("times_ours_tokens_per_second"), goal.over_plain),
                f"at least {goal.over_plain:g}",
                _judged(trl.get("times_ours_tokens_per_second"), goal.over_trl),
                f"at least {goal.over_trl:g}",
                "" if memory is None else _marked(memory, memory <= goal.memory),
                f"at most {goal.memory:g}",
                _marked(floor, floor <= FLOOR_GOAL),
                f"at most {FLOOR_GOAL:g}",
            )
        )
    return found


def _judged(ratio: float | None, least: float) -> str:
    return "" if ratio is None else _marked(ratio, ratio >= least)


def _marked(value: float, reached: bool) -> str:
    return f"{value:.2f}" if reached else f"**{value:.2f}**"


def machine() -> str:
    """Processor, cores, memory, system."""
    import psutil

    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    memory = psutil.virtual_memory().total / 2**30
    processor = names[0] if names else platform.processor()
    found = f"{processor}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {platform.system()}"
    return ", ".join([found, *(gpu.name for gpu in gpus())])


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def commit() -> str:
    """The commit of this checkout, and whether files differ from it."""
    root = Path(__file__).parents[2]
    try:
        found = _git(root, "rev-parse", "--short", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "no commit"
    return f"{found} with local changes" if _git(root, "status", "--porcelain", "-uno") else found


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def append_section(file: Path, command: str, note: str, facts: Sequence[str], tables: Sequence[str]) -> None:
    """A dated section at the end of the results."""
    heading = f"## {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"
    parts = [
        heading,
        *([f"**{note}**"] if note else []),
        f"`{command}`",
        "\n".join(f"- {fact}" for fact in facts),
        *tables,
    ]
    if not file.exists():
        file.write_text("# Measurements\n\nEvery section is the output of its command, added by `--results`.\n")
    with file.open("a", encoding="utf-8") as stream:
        stream.write("\n" + "\n\n".join(parts) + "\n")
