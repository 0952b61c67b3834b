"""How a store scales: `python -m tests.benchmarks.store_scale FOLDER [--artifacts 100000] [--stages 300] [--gb 4]`.

FOLDER gets a store of so many artifacts and a recipe of so many stages, kept, so that a second call only measures. Each
command is a process of its own, as a user starts it; the goals are those of the issue. Then so many GB are stored and
checked out on a local store in a process of its own, beside `cp` and `sha256sum`, which copy and hash the same files.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console

from tests.benchmarks.big_store import big_store
from tests.benchmarks.report import commit, machine, terminal_table

ROUNDS = 3
FILES = 4


def seconds(command: Sequence[str]) -> float:
    """Of one process; its output is read and thrown away."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return time.perf_counter() - started


def command_rows(folder: Path, artifacts: int, stages: int) -> list[list[str]]:
    """Every command with its median and its goal."""
    recipe = folder / "large.yaml"
    if not recipe.exists():
        big_store(folder, artifacts, stages)
    posttrain = [sys.executable, "-m", "flows.cli"]
    cases = {
        "ls": (["ls"], 2.0),
        "plan, all cached": (["plan", str(recipe)], 3.0),
        "plan, its first model changed": (["plan", str(recipe), "--set", "base.seed=7"], 3.0),
        "plan, its rows changed": (["plan", str(recipe), "--set", "rows.limit=1"], 3.0),
        "gc (a dry run)": (["gc"], 60.0),
    }
    rows = []
    for name, (arguments, goal) in cases.items():
        times = [seconds([*posttrain, *arguments, "--store", str(folder / "store")]) for _ in range(ROUNDS)]
        rows.append([name, f"{median(times):.2f}", f"{min(times):.2f}", f"{goal:g}"])
    return rows


def store_and_check_out(store: str, source: str) -> None:
    """In a process of its own: its answer is seconds of both and the peak of its memory."""
    from artifacts import open_store

    opened = open_store(store)
    started = time.perf_counter()
    artifact = opened.put("model", Path(source), producer={})
    stored = time.perf_counter()
    opened.materialize(artifact)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"put": stored - started, "materialize": done - stored, "peak_bytes": peak}))


def transfer_rows(folder: Path, gigabytes: float) -> list[list[str]]:
    """Ours against copying and hashing with standard tools: files that a stage has written, in and out again."""
    folder.mkdir(parents=True, exist_ok=True)
    ours, theirs, peaks = [], [], []
    for number in range(ROUNDS):
        source = folder / "source"
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(folder / "put", ignore_errors=True)
        _random_files(source, gigabytes, number)
        started = time.perf_counter()
        subprocess.run(["cp", "-r", str(source), str(folder / "copy")], check=True)
        subprocess.run(["sync", "-f", str(folder / "copy")], check=True)
        for path in sorted((folder / "copy").iterdir()):
            subprocess.run(["sha256sum", str(path)], check=True, stdout=subprocess.DEVNULL)
        theirs.append(time.perf_counter() - started)
        shutil.rmtree(folder / "copy")
        arguments = ["--put", str(folder / "put"), str(source)]
        command = [sys.executable, "-m", "tests.benchmarks.store_scale", *arguments]
        answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ours.append(answer["put"] + answer["materialize"])
        peaks.append(answer["peak_bytes"])
    shutil.rmtree(folder)
    ratio = median(mine / other for mine, other in zip(ours, theirs, strict=True))
    return [
        [f"put and materialize {gigabytes:g} GB", f"{median(ours):.1f}", f"{min(ours):.1f}", ""],
        ["cp, sync and sha256sum of the same", f"{median(theirs):.1f}", f"{min(theirs):.1f}", ""],
        ["ratio of the two", f"{ratio:.2f}", "", "1.3"],
        ["peak memory of put and materialize, MB", f"{max(peaks) / 1e6:.0f}", "", "500"],
    ]


def _random_files(folder: Path, gigabytes: float, seed: int) -> None:
    folder.mkdir()
    size = int(gigabytes * 1e9 / FILES)
    for number in range(FILES):
        block = os.urandom(2**20)
        with open(folder / f"{seed}-{number}.bin", "wb") as file:
            for start in range(0, size, len(block)):
                file.write(block[: min(len(block), size - start)])
            os.fsync(file.fileno())


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--put"]:
        store_and_check_out(*arguments[1:])
        return 0
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.store_scale", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--artifacts", type=int, default=100_000, help="0: only the transfer")
    parser.add_argument("--stages", type=int, default=300)
    parser.add_argument("--gb", type=float, default=4.0, help="0: only the commands")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    print(f"{options.artifacts:,} artifacts, {options.stages} stages; {machine()}; commit {commit()}", flush=True)
    rows = command_rows(options.folder, options.artifacts, options.stages) if options.artifacts else []
    rows += transfer_rows(options.folder / "transfer", options.gb) if options.gb else []
    Console(width=120).print(terminal_table(["what", "median s", "least s", "goal s"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
