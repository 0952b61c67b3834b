"""Processes that share an engine: four of them over gloo, two and two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from stages.rollouts.engine_group import EngineGroup
from tests.waiting import LIMIT_SECONDS
from tests.warm import Warm

PROGRAM = """
import torch.distributed as dist
from artifacts.errors import StageError
from stages.rollouts.engine_group import EngineGroup

dist.init_process_group("gloo")
rank = dist.get_rank()
group, calls = EngineGroup.of(2), []

def squares(numbers):
    calls.append(list(numbers))
    return [number * number for number in numbers]

def told(*numbers):
    return group.together(numbers, squares, digest=str)

more, second = 10 * (rank // 2), rank % 2  # 2 and 3 ask the same as 0 and 1 do, plus ten
found = told() if second else told(2 + more, 3 + more)
assert found == ([] if second else [(2 + more) ** 2, (3 + more) ** 2]), found
assert told() == []
assert told(4 + more + second) == [(4 + more + second) ** 2]
assert calls == [[2 + more, 3 + more], [4 + more, 5 + more]], calls
try:
    group.together([1], lambda numbers: [rank] * len(numbers), digest=str)
except StageError as error:
    assert "drew different tokens" in str(error)
else:
    raise AssertionError("nobody noticed")
dist.barrier()
dist.destroy_process_group()
"""


def test_each_gets_its_own_answers_from_what_all_compute(warm_process: Warm) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=4", "--no-python"]
    command = [sys.executable, *launcher, *warm_process.command("-c", PROGRAM)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]


def test_alone_it_asks_for_nothing_in_vain() -> None:
    group = EngineGroup.of(1)
    assert group.together([2, 3], lambda numbers: [number + 1 for number in numbers], digest=str) == [3, 4]
    assert group.together([], lambda numbers: 1 / 0, digest=str) == []  # type: ignore[arg-type, return-value]
