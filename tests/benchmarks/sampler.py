"""The embedded sampler against transformers' `generate`: `python -m tests.benchmarks.sampler --rounds 5`.

With `--contestants ours,vllm,generate` also vLLM in process, as the stages open it, in the interpreter that
POSTTRAIN_VLLM_PYTHON names where this one has no vLLM. Same weights, prompts and lengths of completions: all stop every
completion at its given length. Each contestant runs in a fresh process, in turn, round after round; the first call of a
process is not timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from flows.command import stage_variables
from stages.rollouts.engine_settings import PYTHON_VARIABLE
from stages.seeds import generator
from tests.benchmarks.cases import MODELS, Case
from tests.benchmarks.folder import CaseFolder
from tests.benchmarks.report import append_section, commit, machine, markdown_table, terminal_table
from tests.benchmarks.rows import FIRST_TOKEN
from tests.benchmarks.sampler_contestants import CONTESTANTS, LABELS

ROOT = Path(__file__).parents[2]
CALLS = 3
"""Timed calls of a process; the median counts."""


@dataclass(frozen=True)
class Shape:
    """What is sampled in one call."""

    name: str
    prompts: int
    completions: int
    """Of one prompt."""
    prompt: tuple[int, int]
    """Least and most tokens."""
    mean: int
    """Mean tokens of a completion."""
    most: int
    """Most tokens of a completion; as `mean`: all are of this length."""
    goal: float = 1.0
    """How many times as fast as generate."""


SHAPES = (
    Shape("8 prompts of 256, 8 completions of 32 (at most 96)", 8, 8, (256, 256), 32, 96, goal=3.0),
    Shape("8 prompts of 256, 8 completions of 64", 8, 8, (256, 256), 64, 64),
    Shape("8 prompts of 64 to 512, 8 completions of 32 (at most 96)", 8, 8, (64, 512), 32, 96),
    Shape("64 prompts of 20 to 500, 1 completion of 32 (at most 96)", 64, 1, (20, 500), 32, 96),
    Shape("1 prompt of 32, 1 completion of 64", 1, 1, (32, 32), 64, 64),
    Shape("1 prompt of 512, 1 completion of 1", 1, 1, (512, 512), 1, 1),
    Shape("1 prompt of 256, 64 completions of 32 (at most 96)", 1, 64, (256, 256), 32, 96),
    Shape("8 prompts of 16, 1 completion of 128", 8, 1, (16, 16), 128, 128),
    Shape("4 prompts of 1024, 8 completions of 16", 4, 8, (1024, 1024), 16, 16),
    Shape("64 prompts of 32, 1 completion of 1", 64, 1, (32, 32), 1, 1),
    Shape("8 prompts of 16, 16 completions of 16 (at most 48)", 8, 16, (16, 16), 16, 48),
)


def asked(shape: Shape, vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, lengths of every prompt's completions)."""
    draws = generator(0, "sampler benchmark", shape.name)
    lengths = draws.integers(shape.prompt[0], shape.prompt[1] + 1, shape.prompts)
    prompts = [draws.integers(FIRST_TOKEN, vocabulary, length).tolist() for length in lengths]
    total = shape.prompts * shape.completions
    if shape.mean == shape.most:
        drawn = [shape.most] * total
    else:
        # quantiles of an exponential distribution: every call has the same mean, and a longest completion
        mean = shape.mean / (1 - math.exp(-shape.most / shape.mean))
        quantiles = draws.permutation(total)
        drawn = [min(shape.most, max(1, round(-mean * math.log1p(-(place + 0.5) / total)))) for place in quantiles]
    return prompts, [drawn[start : start + shape.completions] for start in range(0, total, shape.completions)]


def contest(spec: dict[str, Any], path: Path) -> dict[str, Any]:
    """In a process of its own: the timed calls of one contestant."""
    from tests.benchmarks.recorder import Recorder

    shape = Shape(**{**spec["shape"], "prompt": tuple(spec["shape"]["prompt"])})
    call = CONTESTANTS[spec["contestant"]](CaseFolder(path), *asked(shape, spec["vocabulary"]))
    call()
    recorder = Recorder()
    recorder.begin()
    for _ in range(CALLS):
        recorder.done({"tokens": call()})
    return recorder.result()


def run(contestant: str, shape: Shape, folder: Path, vocabulary: int, threads: int) -> dict[str, Any]:
    """The result of one process."""
    spec, result = folder / "spec.json", folder / "result.json"
    spec.write_text(json.dumps({"contestant": contestant, "shape": asdict(shape), "vocabulary": vocabulary}))
    result.unlink(missing_ok=True)
    variables = {} if contestant == "generate" else stage_variables(threads)
    python = os.environ.get(PYTHON_VARIABLE) if contestant == "vllm" else None
    done = subprocess.run(
        [python or sys.executable, "-m", "tests.benchmarks.sampler", "--spec", str(spec)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode or not result.is_file():
        sys.exit(f"{shape.name}, {contestant}: ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def measure(shape: Shape, folder: Path, arguments: argparse.Namespace, say: Callable[[str], None]) -> list[str]:
    """A line of the table: medians over the rounds."""
    names: list[str] = arguments.contestants
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, list[float]] = {name: [] for name in names}
    tokens = 0.0
    for turn in range(arguments.rounds):
        for name in names:
            result = run(name, shape, folder, arguments.vocabulary, arguments.threads)
            seconds[name].append(median(result["seconds"]))
            memory[name].append(result["working_memory"] / 2**20)
            tokens = result["values"][0]["tokens"][0]
            say(f"{shape.name}: round {turn + 1} of {arguments.rounds}, {name}: {seconds[name][-1]:.3f} s")
    return [
        shape.name,
        *(f"{tokens / median(seconds[name]):.0f}" for name in names),
        *(times(seconds["ours"], seconds[name]) for name in names if name != "ours"),
        f"{shape.goal:.0f}",
        *(f"{median(memory[name]):.0f}" for name in names),
    ]


def times(own: Sequence[float], theirs: Sequence[float]) -> str:
    """How many times as fast: the median, least and most of the rounds."""
    ratios = [other / mine for mine, other in zip(own, theirs, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def columns(names: Sequence[str]) -> list[str]:
    """Of the table."""
    others = [name for name in names if name != "ours"]
    memory = ["working memory, MiB" if name == "ours" else LABELS[name] for name in names]
    return ["shape", *(LABELS[name] for name in names), *(f"times {name}" for name in others), "goal", *memory]


def numbers(text: str) -> list[int]:
    """Of shapes."""
    found = [int(part) for part in text.split(",")]
    if not all(1 <= number <= len(SHAPES) for number in found):
        raise argparse.ArgumentTypeError(f"shapes are counted from 1 to {len(SHAPES)}")
    return found


def contestants(text: str) -> list[str]:
    """By name, ours among them."""
    found = text.split(",")
    if "ours" not in found or not set(found) <= CONTESTANTS.keys():
        raise argparse.ArgumentTypeError(f"known are {', '.join(CONTESTANTS)}, and ours is always among them")
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sampler", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--model", choices=MODELS, default="S")
    parser.add_argument(
        "--shapes", type=numbers, default=list(range(1, len(SHAPES) + 1)), help="only these, counted from 1: 1,3,11"
    )
    parser.add_argument("--contestants", type=contestants, default=["ours", "generate"], help=", ".join(CONTESTANTS))
    parser.add_argument("--results", type=Path, metavar="FILE", help="append a dated section to this Markdown file")
    parser.add_argument("--spec", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(given: Sequence[str]) -> None:
    """Measure, or be a process that is measured."""
    arguments = parse(given)
    if arguments.spec is not None:
        result = contest(json.loads(arguments.spec.read_text()), arguments.spec.parent)
        (arguments.spec.parent / "result.json").write_text(json.dumps(result))
        return
    from tests.benchmarks.models import save_models

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    with TemporaryDirectory(prefix="benchmark-") as name:
        case = Case(
            stage="grpo",
            prompt_tokens=256,
            completion_tokens=32,
            prompts=8,
            completions=8,
            vocabulary=arguments.vocabulary,
            architecture=MODELS[arguments.model],
        )
        save_models(case, CaseFolder(Path(name)))
        lines = [
            measure(shape, Path(name), arguments, lambda text: console.print(text, style="dim", markup=False))
            for shape in (SHAPES[number - 1] for number in arguments.shapes)
        ]
    titles = columns(arguments.contestants)
    console.print(terminal_table(titles, lines))
    if arguments.results:
        facts = [
            machine(),
            f"posttrain at {commit()}",
            f"Qwen3 of size {arguments.model}, {arguments.vocabulary} tokens, float32, {arguments.threads} threads, "
            f"{arguments.rounds} rounds of {CALLS} calls; load average {os.getloadavg()[0]:.1f} at {time.ctime()}",
        ]
        options = f"--rounds {arguments.rounds} --shapes {','.join(map(str, arguments.shapes))}"
        command = f"python -m tests.benchmarks.sampler {options} --contestants {','.join(arguments.contestants)}"
        append_section(arguments.results, command, "", facts, [markdown_table(titles, lines)])


if __name__ == "__main__":
    main(sys.argv[1:])
