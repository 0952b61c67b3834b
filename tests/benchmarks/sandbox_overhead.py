"""What the sandbox costs a program: `python -m tests.benchmarks.sandbox_overhead [--programs 200]`.

A program that does nothing, with one question: in the sandbox, with and without namespaces; beside it a process of its
own without any confinement (`python -I -S -c`), and `exec` in this process. Medians and 95th percentiles over programs
that are run one after the other, the kinds in turn.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles

from rich.console import Console

from stages.rollouts.sandbox.sandbox import Sandbox
from tests.benchmarks.report import commit, machine, terminal_table

SOURCE = "def f(n):\n    return n + 1\n"
QUESTION = "f(1)"
GOAL_MILLISECONDS = 25.0


def seconds(kinds: dict[str, Callable[[], object]], programs: int) -> dict[str, list[float]]:
    """The time of every program, by kind; one more of each comes first and does not count."""
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(programs + 1):
        for name, run in kinds.items():
            started = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - started)
    return times


def in_this_process() -> object:
    """No process, no confinement."""
    module: dict[str, object] = {}
    exec(compile(SOURCE, "<program>", "exec"), module)
    return eval(QUESTION, module)


def in_a_process() -> object:
    """A process, no confinement."""
    return subprocess.run([sys.executable, "-I", "-S", "-c", f"{SOURCE}\nprint({QUESTION})"], capture_output=True)


def main(arguments: Sequence[str]) -> int:
    """Print the table; 1 where the goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sandbox_overhead")
    parser.add_argument("--programs", type=int, default=200)
    programs = parser.parse_args(arguments).programs
    with Sandbox() as full, Sandbox(namespaces=False) as bare:
        kinds: dict[str, Callable[[], object]] = {
            "sandbox": lambda: full.values(SOURCE, [QUESTION]),
            "sandbox without namespaces": lambda: bare.values(SOURCE, [QUESTION]),
            "process": in_a_process,
            "exec": in_this_process,
        }
        times = seconds(kinds, programs)
        outer = full.no_namespaces or "namespaces"
    rows = [
        [name, f"{median(spent) * 1e3:.2f}", f"{quantiles(spent, n=20)[-1] * 1e3:.2f}"] for name, spent in times.items()
    ]
    overhead = (median(times["sandbox"]) - median(times["exec"])) * 1e3
    console = Console()
    console.print(terminal_table(["kind", "median ms", "95 % ms"], rows))
    console.print(f"{programs} programs each; {outer}; {machine()}; {commit()}", highlight=False)
    console.print(f"median overhead {overhead:.2f} ms; goal at most {GOAL_MILLISECONDS:g} ms", highlight=False)
    return 0 if overhead <= GOAL_MILLISECONDS else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
