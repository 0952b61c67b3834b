"""Unit tests on generated Python code, run in the sandbox and judged outside it, from values."""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal

from pydantic import Field

from artifacts.errors import DataError, RequestError, StageError
from stages.rollouts.code_tests import Dialogue, Question, Test, tests_of
from stages.rollouts.reward_base import BuiltIn, content_of
from stages.rollouts.sandbox.kernel import SandboxError, probe
from stages.rollouts.sandbox.limits import Limits
from stages.rollouts.sandbox.pool import SandboxPool
from stages.rollouts.sandbox.sandbox import Sandbox

_FENCED = re.compile(r"^```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE | re.IGNORECASE)


class Code(BuiltIn):
    """1 where the completion's Python code passes the row's `tests` in a sandbox, 0 where it does not.

    The code is the completion's last fenced block, or all of it; what column `setup` holds runs before it. Column
    `tests` lists assertions ("assert f(2) == 4"), calls ({"call": "f(2)", "expected": 4}) or whole programs
    ({"input": "2", "output": "4"}). Programs have the standard library, a folder of their own and no network.
    """

    operational: ClassVar[frozenset[str]] = frozenset({"workers", "unsafe"})

    credit: Literal["all", "share"] = "all"
    """1 only for passing every test, or the share of tests passed."""
    cpu_seconds: int = Field(5, ge=1)
    """Processor time of a program: of all assertions of a row together, of each input alone."""
    wall_seconds: float = Field(30.0, gt=0)
    """Time of a program on the clock, for one that waits; much more than cpu_seconds, or the load of the machine
    decides."""
    memory_mb: int = Field(512, ge=128)
    """Address space of a program."""
    workers: int | None = Field(None, ge=1)
    """Programs that run side by side; null: one a processor core."""
    unsafe: bool = False
    """Run where the kernel cannot confine programs too, with the layers that there are."""

    def prepare(self) -> None:
        offer = probe()
        if (lacks := offer.missing()) and not (self.unsafe and offer.system == "linux"):
            raise RequestError(
                f"reward code cannot confine generated code on this machine; there is no {'; and no '.join(lacks)}. "
                "Parameter unsafe: true runs it nevertheless, with the rights of this user"
            )

    def needed_columns(self) -> Sequence[tuple[str, ...]]:
        """The tests'."""
        return (("tests",),)

    def score(
        self, completions: Sequence[Any], tests: Sequence[Any], setup: Sequence[str | None] | None = None
    ) -> list[float | Exception | None]:
        rewards: list[float | Exception | None] = [None] * len(completions)
        jobs: dict[int, Callable[[Sandbox], float]] = {}
        for index, (made, row) in enumerate(zip(completions, tests, strict=True)):
            if row is None:
                continue
            try:
                before = (setup[index] if setup is not None else None) or ""
                source = f"{before}\n{code_of(content_of(made))}" if before else code_of(content_of(made))
                jobs[index] = partial(self._reward, source, tests_of(row))
            except DataError as error:
                rewards[index] = DataError(f"cannot use the row's tests: {error}")
        for index, reward in zip(jobs, self._run(list(jobs.values())), strict=True):
            rewards[index] = reward
        return rewards

    def _run(self, jobs: Sequence[Callable[[Sandbox], float]]) -> list[float]:
        if not jobs:
            return []
        limits = Limits(self.cpu_seconds, self.wall_seconds, self.memory_mb)
        try:
            workers = self.workers or len(os.sched_getaffinity(0))
            return _pool(limits, workers, self.unsafe, os.getpid()).run(jobs)
        except SandboxError as error:
            raise StageError(f"reward code: {error}") from error

    def _reward(self, source: str, tests: Sequence[Test], sandbox: Sandbox) -> float:
        passed = verdicts(sandbox, source, tests, stop_early=self.credit == "all")
        return sum(passed) / len(tests) if self.credit == "share" else float(all(passed))


@lru_cache(maxsize=4)
def _pool(limits: Limits, workers: int, unsafe: bool, process: int) -> SandboxPool:
    """Kept until the process ends, and no other process's: a server starts as slowly as dozens of programs run."""
    pool = SandboxPool(workers, partial(Sandbox, limits, unsafe=unsafe))
    atexit.register(pool.close)
    return pool


def verdicts(sandbox: Sandbox, source: str, tests: Sequence[Test], *, stop_early: bool = False) -> list[bool]:
    """Whether the program passes each test: questions first, in one process; then dialogues, a process each.

    stop_early: only up to the first that fails. Raises SandboxError.
    """
    questions = [test for test in tests if isinstance(test, Question)]
    passed = []
    if questions:
        found = sandbox.values(source, [question.expression for question in questions])
        passed = [
            answer.error is None and question.accepts(answer.data)
            for question, answer in zip(questions, found, strict=True)
        ]
    for test in tests:
        if stop_early and not all(passed):
            break
        if isinstance(test, Dialogue):
            printed = sandbox.output(source, test.input)
            passed.append(printed.problem is None and test.accepts(printed.text))
    return passed


def code_of(text: str) -> str:
    """The last fenced block of a completion, or all of it."""
    blocks = _FENCED.findall(text)
    return str(blocks[-1]) if blocks else text
