"""Predicted against measured memory of a stage that samples with vLLM: `python -m tests.benchmarks.engine_memory`.

What `posttrain plan --memory` says of stage `rl`, beside the peak of what its processes hold together while it runs as
a recipe would run it: the stage, and vLLM's servers where it has any. Needs vLLM, in the environment itself for engine
`vllm`, for servers in that of `--vllm-python`. Resident pages that several processes map count once (PSS); weights that
lie in shared memory are mapped by nobody, and are added.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from rich.console import Console

from flows.command import stage_variables
from stages.context import local_context
from stages.rl import Config, memory
from stages.rollouts.engine_settings import PYTHON_VARIABLE
from stages.rollouts.weight_files import SHARED_MEMORY
from stages.training.memory_phase import Phase, worst
from stages.training.memory_request import Request
from stages.training.memory_training import Setup
from tests.benchmarks.cases import MODELS, Case, case_of
from tests.benchmarks.folder import CaseFolder
from tests.benchmarks.memory_prediction import WITHIN, shape_of
from tests.benchmarks.online import save_prompts
from tests.benchmarks.report import append_section, commit, machine, markdown_table, terminal_table
from tests.benchmarks.rounds import ROOT, BenchmarkError, Processes
from tests.benchmarks.rows import make_rows

ENGINES = ("embedded", "vllm", "vllm_server")
COLUMNS = ("case", "predicted MB", "measured MB", "error", "of the prediction")
_LOOK_SECONDS = 0.2
_UNLIMITED = 1e18


@dataclass(frozen=True)
class Compared:
    """One engine. Bytes."""

    name: str
    predicted: Phase
    measured: list[float]

    @property
    def error(self) -> float:
        """Prediction over measurement, less one."""
        return self.predicted.total / median(self.measured) - 1


def settings_of(case: Case, engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """Of the stage: whole steps of GRPO."""
    apart = {"kv_cache_gib": options.kv_cache_gib, "proof_interval": 1}
    servers = {"servers": options.servers} if engine == "vllm_server" else {}
    return {
        "max_steps": options.steps,
        "train_batch_size": case.prompts * case.completions,
        "num_generations": case.completions,
        "max_length": max(len(row.prompt) for row in make_rows(case)),
        "max_completion_length": case.completion_tokens,
        "temperature": 1.0,
        "rewards": [f"{ROOT / 'tests/benchmarks/online_reward.py'}:even_share"],
        "rollouts": {"engine": engine, **({} if engine == "embedded" else {**apart, **servers})},
    }


def predict(case: Case, settings: dict[str, Any]) -> Phase:
    """The largest phase of the stage."""
    shapes = {"model": shape_of(case.architecture, case)}
    request = Request(Config.model_validate(settings), shapes, frozenset(("model", "dataset")), Setup())
    return worst(memory(request), _UNLIMITED)


def measure(settings: dict[str, Any], inputs: dict[str, Path | list[Path]], options: argparse.Namespace) -> float:
    """The most that the stage and all that it started held at once. Raises BenchmarkError where it fails."""
    with TemporaryDirectory(prefix="posttrain-memory-run-") as own:
        context = local_context("rl", settings, folder=Path(own), inputs=inputs)
        spec, log = Path(own) / "spec.json", Path(own) / "log.txt"
        spec.write_text(json.dumps({**asdict(context.spec), "threads": options.threads}), encoding="utf-8")
        found = stage_variables(options.threads)
        if options.vllm_python:
            found[PYTHON_VARIABLE] = options.vllm_python
        with open(log, "wb") as output:
            stage = psutil.Popen(
                [sys.executable, "-m", "stages", str(spec)],
                cwd=ROOT,
                env={**os.environ, **found},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            peak = max(_held_while(stage))
        if stage.wait() != 0:
            raise BenchmarkError(f"the stage ended with status {stage.returncode}:\n{log.read_text()[-3000:]}")
        return peak


def _held_while(stage: psutil.Popen) -> Iterator[float]:
    while stage.poll() is None:
        with suppress(psutil.Error):
            together = [stage, *stage.children(recursive=True)]
            yield sum(_proportional_bytes(one.pid) for one in together) + _in_shared_memory(together)
        time.sleep(_LOOK_SECONDS)


def _proportional_bytes(process: int) -> float:
    """PSS of a process: a page that n processes map counts an n-th for each; 0 for one that is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024.0 * int(line.split()[1])
    return 0.0


def _in_shared_memory(processes: Sequence[psutil.Process]) -> float:
    """Of the weights in the folders of these processes' servers, which nobody keeps mapped."""
    folders = set()
    for one in processes:
        with suppress(psutil.Error):
            named = [Path(word).parts for word in one.cmdline() if word.startswith(f"{SHARED_MEMORY}/posttrain-")]
            folders |= {Path(*parts[:4]) for parts in named}
    total = 0.0
    for path in [path for folder in folders for path in folder.rglob("*.safetensors")]:
        with suppress(OSError):  # replaced by the next ones
            total += path.stat().st_size
    return total


def compare(options: argparse.Namespace) -> list[Compared]:
    """Every engine that is asked for, on the same model and prompts."""
    case = case_of("online", options.shape, vocabulary=options.vocabulary, model=options.model)
    found = []
    with TemporaryDirectory(prefix="posttrain-memory-") as name:
        folder = CaseFolder(Path(name))
        Processes(case, folder.path, options.threads).run("prepare")
        prompts = save_prompts(make_rows(case), folder)
        for engine in options.engines.split(","):
            settings = settings_of(case, engine, options)
            measured = [
                measure(settings, {"model": folder.model, "dataset": prompts}, options) for _ in range(options.rounds)
            ]
            found.append(Compared(f"{case.name}, {engine}", predict(case, settings), measured))
    return found


def lines(found: Sequence[Compared]) -> list[tuple[str, ...]]:
    """Cells under COLUMNS, a line an engine."""
    return [
        (
            one.name,
            f"{one.predicted.total / 1e6:.0f}",
            f"{median(one.measured) / 1e6:.0f}",
            f"{one.error:+.1%}",
            f"{one.predicted.name}: "
            + ", ".join(f"{part} {size / 1e6:.0f}" for part, size in one.predicted.parts.items()),
        )
        for one in found
    ]


def publish(found: Sequence[Compared], options: argparse.Namespace, given: Sequence[str]) -> None:
    """A section of the results."""
    words = [word for word in given if word not in ("--results", str(options.results), options.vllm_python)]
    append_section(
        options.results,
        shlex.join(["python", "-m", "tests.benchmarks.engine_memory", *words]),
        f"Predicted against measured memory of stages with vLLM, all processes together; the aim is {WITHIN:.0%}.",
        [machine(), f"posttrain at {commit()}, {options.rounds} rounds, {options.threads} threads, float32"],
        [markdown_table(COLUMNS, lines(found))],
    )


def main(arguments: Sequence[str]) -> int:
    """Exit status 1 where a prediction is off by more than the aim."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.engine_memory")
    parser.add_argument("--engines", default="vllm,vllm_server", help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--shape", default="P128C64")
    parser.add_argument("--model", default="S", choices=list(MODELS))
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--kv-cache-gib", type=float, default=1.0)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vllm-python", default="", metavar="PATH", help="the interpreter that has vLLM")
    parser.add_argument("--results", type=Path, metavar="FILE", help="append a dated section to this Markdown file")
    options = parser.parse_args(arguments)
    found = compare(options)
    Console(width=None if sys.stdout.isatty() else 160).print(terminal_table(COLUMNS, lines(found)))
    if options.results:
        publish(found, options, arguments)
    return int(any(abs(one.error) > WITHIN for one in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
