"""Runs a case: every contestant in a fresh process, in turn, round after round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from flows.command import stage_variables
from tests.benchmarks.cases import Case
from tests.benchmarks.floor import ONEDNN, step_flops
from tests.benchmarks.parity import BF16_TOLERANCE, TOLERANCE, difference, require_parity
from tests.benchmarks.rows import batches, make_rows
from tests.benchmarks.worker import CONTESTANTS, case_to_json

ROOT = Path(__file__).parents[2]
STOLEN, TRIES = 0.03, 4
"""Share of the processors' time that the host may take from a run; a run that lost more is repeated, so often."""
SAME_NUMBERS = ("plain", "trl-best")
"""Contestants that compute what `ours` computes; TRL's defaults compute in bfloat16."""


class BenchmarkError(Exception):
    """A contestant's process failed."""


class DoesNotFitError(BenchmarkError):
    """The GPU's memory was not enough for it."""


@dataclass
class Runs:
    """One contestant's runs, one a round."""

    name: str
    warmup: int
    """First steps of a run that are not timed."""
    results: list[dict[str, Any]] = field(default_factory=list)
    parity: float | None = None
    """Largest relative difference of its numbers from ours; None where it computes something else, or is ours."""

    def step_seconds(self) -> list[float]:
        """The median step of every round, without the first steps."""
        return [median(result["seconds"][self.warmup :]) for result in self.results]

    def most_stolen(self) -> float:
        """Share of the processors' time that the host took from the run that lost most."""
        return max(result["stolen"] for result in self.results)

    def working_memory(self) -> list[int]:
        """Bytes, of every round."""
        return [result["working_memory"] for result in self.results]


@dataclass
class Measured:
    """A case with everything that was seen."""

    case: Case
    runs: dict[str, Runs]
    rates: dict[str, list[float]]
    """Shape of a product -> floating-point operations a second, of every round."""
    flops: float
    """Necessary operations of the median timed step."""
    tokens: float
    """Completion tokens of a timed step, on average."""
    loads: list[float]
    """Load averages before every round."""
    versions: dict[str, str]
    too_large: list[str] = field(default_factory=list)
    """Contestants that the GPU's memory was not enough for."""

    @property
    def best_rate(self) -> tuple[str, float]:
        """The shape that torch.mm multiplies fastest, and its median rate."""
        return self._best(lambda name: not name.startswith(ONEDNN))

    @property
    def best_onednn_rate(self) -> tuple[str, float] | None:
        """The same of oneDNN; None where it was not measured."""
        measured = any(name.startswith(ONEDNN) for name in self.rates)
        return self._best(lambda name: name.startswith(ONEDNN)) if measured else None

    def _best(self, counts: Callable[[str], bool]) -> tuple[str, float]:
        medians = {name: median(rates) for name, rates in self.rates.items() if counts(name)}
        name = max(medians, key=lambda one: medians[one])
        return name, medians[name]

    @property
    def floor_seconds(self) -> float:
        """The time of a step whose operations all run at torch.mm's best rate."""
        return self.flops / self.best_rate[1]

    @property
    def onednn_floor_seconds(self) -> float | None:
        """The same at oneDNN's best rate."""
        rate = self.best_onednn_rate
        return None if rate is None else self.flops / rate[1]


def measure(
    case: Case,
    contestants: Sequence[str],
    rounds: int,
    *,
    threads: int,
    say: Callable[[str], None],
    clock: str = "wall",
) -> Measured:
    """Raises ParityError where numbers differ that should not, BenchmarkError where a process fails."""
    steps = batches(case, make_rows(case))[case.warmup_steps :]
    measured = Measured(
        case=case,
        runs={name: Runs(name, case.warmup_steps) for name in contestants},
        rates={},
        flops=median(step_flops(case, rows) for rows in steps),
        tokens=sum(row.completion_tokens for rows in steps for row in rows) / len(steps),
        loads=[],
        versions={},
    )
    with TemporaryDirectory(prefix="benchmark-") as name:
        processes = Processes(case, Path(name), threads, clock)
        measured.versions = processes.run("prepare")["versions"]
        for turn in range(rounds):
            measured.loads.append(os.getloadavg()[0])
            for shape, rate in processes.run("matrix-rate")["rates"].items():
                measured.rates.setdefault(shape, []).append(rate)
            for contestant in list(measured.runs):
                try:
                    result = _undisturbed(processes, contestant, say)
                except DoesNotFitError:
                    if contestant == "ours":
                        raise
                    say(f"{case.name}: {contestant}: out of memory")
                    measured.too_large.append(contestant)
                    del measured.runs[contestant]
                    continue
                measured.runs[contestant].results.append(result)
                timed = result["seconds"][case.warmup_steps :]
                memory = result["working_memory"] / 2**20
                say(
                    f"{case.name}: round {turn + 1} of {rounds}, {contestant}: {median(timed):.3f} s a step, "
                    f"{memory:,.0f} MiB"
                )
            _gate(measured)
    return measured


def _undisturbed(processes: Processes, contestant: str, say: Callable[[str], None]) -> dict[str, Any]:
    """A run of which the host took little; the last one where none is."""
    for again in range(TRIES):
        result = processes.run(contestant)
        if result["stolen"] <= STOLEN:
            break
        say(f"{contestant}: the host took {result['stolen']:.0%} of the time, try {again + 1} of {TRIES}")
    return result


def _gate(measured: Measured) -> None:
    """Every step of the newest round against ours; in bfloat16 those before rows come again, for what a model has
    learned by heart follows from every rounding."""
    ours = measured.runs.get("ours")
    if ours is None:
        return
    count = measured.case.warmup_steps if measured.case.bf16 else measured.case.steps
    own = ours.results[-1]["values"][:count]
    for name in SAME_NUMBERS:
        if (runs := measured.runs.get(name)) is not None:
            theirs = runs.results[-1]["values"][:count]
            tolerance = BF16_TOLERANCE if measured.case.bf16 else TOLERANCE
            require_parity("ours", own, name, theirs, tolerance)
            runs.parity = max(runs.parity or 0.0, difference(own, theirs))


class Processes:
    """Starts the tasks of a case one after the other; ours with what the launcher gives every stage."""

    def __init__(self, case: Case, folder: Path, threads: int, clock: str = "wall") -> None:
        self.case, self.folder, self.threads, self.clock = case, folder, threads, clock

    def run(self, task: str) -> dict[str, Any]:
        """The result of a task in a process of its own."""
        spec, result = self.folder / "spec.json", self.folder / "result.json"
        spec.write_text(
            json.dumps({"task": task, "case": case_to_json(self.case), "clock": self.clock}), encoding="utf-8"
        )
        result.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.worker", str(spec)],
            cwd=ROOT,
            env=os.environ | self._environment(task),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode != 0 or not result.is_file():
            kind = DoesNotFitError if "torch.OutOfMemoryError" in done.stderr else BenchmarkError
            raise kind(f"{self.case.name}: {task} ended with status {done.returncode}:\n{done.stderr[-3000:].strip()}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found

    def _environment(self, task: str) -> dict[str, str]:
        ours = stage_variables(self.threads) if task == "ours" else {}
        return {
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **ours,
        }


def require_known(contestants: Sequence[str]) -> None:
    """Raises ValueError for a name that is none, or TRL where it is not installed."""
    from importlib.util import find_spec

    for name in contestants:
        if name not in CONTESTANTS:
            raise ValueError(f"no contestant {name!r}; there are {', '.join(CONTESTANTS)}")
    if any(name.startswith("trl") for name in contestants) and find_spec("trl") is None:
        raise ValueError("TRL is not installed: pip install -e '.[benchmarks]', or give --contestants ours,plain")
