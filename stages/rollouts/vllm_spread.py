"""Who answers what, among several servers: the least laden one, the one that knows the prompt, another one where one
fails. Nothing here knows HTTP."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from artifacts.errors import StageError
from stages.rollouts.vllm_connection import ServerFailure, ServerSilence

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

MOST_TRIES = 5
"""Failures over one prompt after which it is given up: it may be what makes servers fail."""


@dataclass(frozen=True)
class Job:
    """A prompt and all that is asked of it at once; one server answers all of it."""

    name: str
    """Of the prompt, in messages; the server that has answered it before has its beginning in the prefix cache."""
    prompt_tokens: int
    new_tokens: int
    """At most, of all completions."""
    questions: int = 1

    @property
    def tokens(self) -> int:
        """At most, read and written."""
        return self.prompt_tokens + self.new_tokens


class Asking(Protocol[T_co]):
    """What a round needs of the servers."""

    @property
    def labels(self) -> Sequence[str]:
        """Of the servers, in messages."""
        ...

    async def begin(self) -> dict[int, str]:
        """The servers that cannot be asked, each with the reason."""
        ...

    async def ask(self, server: int, job: int) -> T_co:
        """The answer to a job. Raises ServerFailure, ServerSilence, or another error that no other server mends."""
        ...

    async def revived(self, server: int, error: ServerFailure) -> str | None:
        """Waits until a server that failed serves again; the reason where it will not."""
        ...

    async def doubt(self, server: int) -> str | None:
        """Why what a server answered is not to be believed, looked at when all is answered; None: it is."""
        ...


class Homes:
    """Which server has a prompt in its prefix cache, and how much is asked of one at once."""

    def __init__(self, servers: int, questions_at_once: int) -> None:
        self.servers, self.questions_at_once = servers, questions_at_once
        self._of: dict[str, int] = {}
        self.most_outstanding = [0] * servers
        """Tokens, at most read and written, that a server had before it at once."""

    def forget(self) -> None:
        """Prefix caches are empty."""
        self._of.clear()

    def choose(self, job: Job, serving: Sequence[int], outstanding: Sequence[int]) -> int:
        """The server with the least before it, or the prompt's own where that saves more reading than it waits."""
        least = min(serving, key=lambda server: (outstanding[server], server))
        home = self._of.get(job.name, least)
        if home in serving and outstanding[home] - outstanding[least] <= job.prompt_tokens:
            least = home
        self._of[job.name] = least
        return least


class Round(Generic[T]):
    """All jobs of a call, each answered once."""

    def __init__(
        self, homes: Homes, jobs: Sequence[Job], asking: Asking[T], on_answer: Callable[[int], None] | None = None
    ) -> None:
        """`on_answer` is called with the number of the job."""
        self._homes, self._jobs, self._asking, self._on_answer = homes, jobs, asking, on_answer
        self._waiting = deque(range(len(jobs)))
        self._serving: set[int] = set()
        self._lost: dict[int, str] = {}
        self._outstanding, self._questions = [0] * homes.servers, [0] * homes.servers
        self._answers: dict[int, T] = {}
        self.by: dict[int, int] = {}
        """Job -> server that answered it."""
        self._failures: Counter[int] = Counter()
        self._events: asyncio.Queue[Callable[[], None]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._begun = 0
        """Works whose events are still to come."""

    async def run(self) -> list[T]:
        """The answers in the order of the jobs. Raises StageError when no server is left, with the reason of each."""
        self._lost = await self._asking.begin()
        self._serving = set(range(self._homes.servers)) - self._lost.keys()
        try:
            while len(self._answers) < len(self._jobs):
                self._hand_out()
                if not self._begun:
                    raise StageError(self._nobody())
                happened = await self._events.get()
                self._begun -= 1
                happened()
                if len(self._answers) == len(self._jobs):
                    await self._confirm()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        return [self._answers[index] for index in range(len(self._jobs))]

    def _hand_out(self) -> None:
        most = self._homes.questions_at_once
        while self._waiting:
            job = self._jobs[self._waiting[0]]
            free = [s for s in self._serving if not self._questions[s] or self._questions[s] + job.questions <= most]
            if not free:
                return
            index, server = self._waiting.popleft(), self._homes.choose(job, free, self._outstanding)
            self._outstanding[server] += job.tokens
            self._questions[server] += job.questions
            peaks = self._homes.most_outstanding
            peaks[server] = max(peaks[server], self._outstanding[server])
            self._begin(self._asking.ask(server, index), partial(self._answered, server, index))

    def _begin(self, work: Awaitable[Any], then: Callable[[Any], None]) -> None:
        """`then` is called in turn, with what comes of the work or its error."""

        async def do() -> None:
            try:
                found: Any = await work
            except Exception as error:
                found = error
            self._events.put_nowait(partial(then, found))

        self._begun += 1
        task = asyncio.create_task(do())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _answered(self, server: int, index: int, found: T | Exception) -> None:
        job = self._jobs[index]
        self._outstanding[server] -= job.tokens
        self._questions[server] -= job.questions
        if isinstance(found, ServerFailure | ServerSilence):
            self._failed(server, index, found)
        elif isinstance(found, Exception):
            raise found
        else:
            self._answers[index], self.by[index] = found, server
            if self._on_answer is not None:
                self._on_answer(index)

    def _failed(self, server: int, index: int, error: ServerFailure | ServerSilence) -> None:
        self._failures[index] += 1
        if self._failures[index] >= MOST_TRIES:
            raise StageError(f"{self._jobs[index].name} was asked {MOST_TRIES} times, and each time {error}") from error
        self._waiting.appendleft(index)
        if server not in self._serving:
            return
        self._serving.remove(server)
        if isinstance(error, ServerSilence):  # it may be at it still: nothing more is put on it
            self._lost[server] = str(error)
        else:
            self._begin(self._asking.revived(server, error), partial(self._revived, server))

    def _revived(self, server: int, found: str | Exception | None) -> None:
        if isinstance(found, Exception):
            raise found
        if found is None:
            self._serving.add(server)
        else:
            self._lost[server] = found

    async def _confirm(self) -> None:
        """Take back what servers answered that are not to be believed."""
        used = sorted(set(self.by.values()))
        for server, reason in zip(used, await asyncio.gather(*map(self._asking.doubt, used)), strict=True):
            if reason is None:
                continue
            self._serving.discard(server)
            self._lost[server] = reason
            for index in [index for index, by in self.by.items() if by == server]:
                del self._answers[index], self.by[index]
                self._waiting.append(index)

    def _nobody(self) -> str:
        reasons = [f"{self._asking.labels[server]}: {reason}" for server, reason in sorted(self._lost.items())]
        return "no vLLM server is left that could answer" + "".join(f"\n{reason}" for reason in reasons)
