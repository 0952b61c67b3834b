"""Which server answers which prompt, worked out by hand, and what becomes of prompts whose server fails."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest

from artifacts.errors import StageError
from stages.rollouts.vllm_connection import ServerFailure, ServerSilence
from stages.rollouts.vllm_spread import MOST_TRIES, Homes, Job, Round


def test_the_least_laden_one_or_the_prompts_own() -> None:
    homes = Homes(3, 8)
    assert homes.choose(Job("a", 10, 50), [0, 1, 2], [70, 30, 30]) == 1
    assert homes.choose(Job("b", 10, 50), [0, 1, 2], [70, 90, 30]) == 2
    # reading a's 10 tokens again would cost as much as waiting behind 10 more
    assert homes.choose(Job("a", 10, 50), [0, 1, 2], [70, 40, 30]) == 1
    assert homes.choose(Job("a", 10, 50), [0, 1, 2], [70, 41, 30]) == 2
    assert homes.choose(Job("a", 10, 50), [0, 1, 2], [0, 41, 5]) == 2  # which knows it now
    assert homes.choose(Job("a", 10, 50), [0, 1], [70, 41, 5]) == 1  # that one does not serve
    homes.forget()
    assert homes.choose(Job("a", 10, 50), [0, 1, 2], [3, 0, 5]) == 1


class Scripted:
    """Servers that do to a job what a function says, which is told how often the job was asked before."""

    def __init__(self, count: int, does: Callable[[int, int, int], Any]) -> None:
        self.labels = [f"server {number}" for number in range(count)]
        self.does, self.asked = does, [[] for _ in range(count)]
        self.lost: dict[int, str] = {}
        self.returns: dict[int, str | None] = {}
        self.doubts: dict[int, list[str | None]] = {}
        self.together, self.most_together = [0] * count, [0] * count

    async def begin(self) -> dict[int, str]:
        return dict(self.lost)

    async def ask(self, server: int, job: int) -> str:
        tries = sum(asked.count(job) for asked in self.asked)
        self.asked[server].append(job)
        self.together[server] += 1
        self.most_together[server] = max(self.most_together[server], self.together[server])
        await asyncio.sleep(0)
        self.together[server] -= 1
        found = self.does(server, job, tries)
        if isinstance(found, Exception):
            raise found
        return f"{job} by {server}"

    async def revived(self, server: int, error: ServerFailure) -> str | None:
        await asyncio.sleep(0.01)
        return self.returns.get(server, str(error))

    async def doubt(self, server: int) -> str | None:
        return self.doubts[server].pop(0) if self.doubts.get(server) else None


def go(asking: Scripted, jobs: int, at_once: int = 4) -> list[str]:
    """The answers; each job is answered once."""
    answered: list[int] = []
    homes = Homes(len(asking.labels), at_once)
    listed = [Job(f"row {index}", 1, 9) for index in range(jobs)]
    found = asyncio.run(Round(homes, listed, asking, answered.append).run())
    if not asking.doubts:
        assert sorted(answered) == list(range(jobs))
    assert [answer.split()[0] for answer in found] == [str(index) for index in range(jobs)]
    return [answer.split()[2] for answer in found]


def well(server: int, job: int, tries: int) -> None:
    return None


def test_all_are_used_evenly_and_asked_for_no_more_than_they_take_at_once() -> None:
    asking = Scripted(3, well)
    assert go(asking, 12) == ["0", "1", "2"] * 4
    asking = Scripted(2, well)
    go(asking, 40, at_once=4)
    assert asking.most_together == [4, 4]


def test_what_a_server_leaves_undone_others_do() -> None:
    asking = Scripted(2, lambda server, job, tries: ServerFailure("it broke off") if server == 0 else None)
    assert go(asking, 9) == ["1"] * 9
    # only what it had before it when it failed; nobody asks it again
    assert asking.asked[0] == [0, 2, 4, 6] and sorted(asking.asked[1]) == list(range(9))


def test_a_server_that_comes_back_is_asked_again() -> None:
    alone = Scripted(1, lambda server, job, tries: ServerFailure("it broke off") if tries == 0 else None)
    alone.returns[0] = None
    assert go(alone, 3) == ["0"] * 3
    assert sorted(alone.asked[0]) == [0, 0, 1, 1, 2, 2]


def test_one_that_is_silent_or_absent_gets_nothing_more() -> None:
    asking = Scripted(3, lambda server, job, tries: ServerSilence("no answer") if server == 0 else None)
    asking.lost[2] = "it has other weights"
    assert go(asking, 8) == ["1"] * 8
    assert asking.asked[2] == []


def test_answers_in_doubt_are_asked_for_again() -> None:
    asking = Scripted(2, well)
    asking.doubts = {0: ["it was started again meanwhile"]}
    assert go(asking, 4) == ["1"] * 4


FAILING: list[tuple[Scripted, dict[int, str | None], str]] = [
    (
        Scripted(2, lambda server, job, tries: ServerFailure(f"end {server}")),
        {},
        r"no vLLM server is left that could answer\nserver 0: end 0\nserver 1: end 1$",
    ),
    (
        Scripted(2, lambda server, job, tries: ServerFailure("it ended") if job == 2 else None),
        {0: None, 1: None},
        rf"^row 2 was asked {MOST_TRIES} times, and each time it ended",
    ),
    (Scripted(2, lambda server, job, tries: StageError("no token") if job == 1 else None), {}, "^no token$"),
]


@pytest.mark.parametrize(("asking", "returns", "message"), FAILING)
def test_failing(asking: Scripted, returns: dict[int, str | None], message: str) -> None:
    asking.returns = returns
    with pytest.raises(StageError, match=re.compile(message)):
        go(asking, 4)
