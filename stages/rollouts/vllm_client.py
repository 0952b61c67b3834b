"""An engine behind vLLM's servers: completions over HTTP, spread over them; weights by files that they read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from itertools import groupby
from typing import Any, Generic, Protocol, TypeVar

import httpx
from torch import Tensor

from stages.rollouts.engine import ServedModel
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.requests import Completion, Progress, SampleRequest, SamplingConfig
from stages.rollouts.vllm_connection import Address, Connection, ServerFailure
from stages.rollouts.vllm_in_flight import Amid, Named
from stages.rollouts.vllm_requests import Answer, Asked, Reading, bundles, filled, parameters, stop_tokens, wanted
from stages.rollouts.vllm_scoring import NO_PLACES, Likely, Scoring, likeliest_tokens, own_tokens
from stages.rollouts.vllm_spread import Asking, Homes, Job, Round

T = TypeVar("T")

QUESTIONS_AT_ONCE = 256
"""That one server has before it; more wait on this side, for the server that is ready first."""
_CONNECTIONS = 768
"""To all servers together; each is an open file."""
_POLL_SECONDS = 0.2


class Servers(Named, Protocol):
    """The servers of an engine."""

    @property
    def addresses(self) -> Sequence[Address]:
        """Of each."""
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Have all of them take these weights; none of them makes a token by others any more."""
        ...

    def absent(self) -> dict[int, str]:
        """Those that do not serve the weights of the moment, and will not by themselves; each with the reason."""
        ...

    def broke_off(self, server: int, error: ServerFailure) -> str | None:
        """Why this one will not serve again after a failure; None: it does, or is being started again."""
        ...

    def doubt(self, server: int) -> str | None:
        """Why answers that this one gave since `absent` was asked are not of the weights of the moment; None: they
        are."""
        ...

    def restarts(self) -> list[int]:
        """How often each was started again."""
        ...


class ServerEngine:
    """An `Engine` that asks servers. Requests carry seeds, so it makes no difference which one answers."""

    def __init__(self, servers: Servers, model: ServedModel, settings: EngineConfig) -> None:
        """Raises StageError where one serves another model."""
        self._servers, self._model = servers, model
        timeout = settings.request_timeout_seconds
        self._connections = [Connection(address, timeout) for address in servers.addresses]
        count = len(self._connections)
        self._homes = Homes(count, min(QUESTIONS_AT_ONCE, _CONNECTIONS // count))
        self._tokens = [0] * count
        self._ask = Amid(servers).ask if settings.changes_in_flight else _completions
        for connection in self._connections:
            with suppress(ServerFailure):  # one that is being started again says its name with every answer
                connection.check_name()

    def sample(
        self, requests: Sequence[SampleRequest], settings: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """For every request its completions, in the order of its seeds: a prompt's are one server's."""
        asked, stops = wanted(requests, settings.max_completion_length), stop_tokens(self._model, settings)
        prompts = [list(group) for _, group in groupby(asked, key=lambda one: one.request)]
        readings = [Reading(self._model, settings, stops, one.label) for one in self._servers.addresses]

        async def complete(server: int, client: httpx.AsyncClient, index: int) -> list[Completion]:
            async def together(bundle: list[Asked]) -> list[Completion]:
                given = parameters(bundle[0], settings, stops)
                answers = await self._ask(self._connections[server], client, bundle, given)
                read = readings[server].completion
                return [read(one, answer) for one, answer in zip(bundle, answers, strict=True)]

            found = await asyncio.gather(*map(together, bundles(prompts[index])))
            return [completion for bundle in found for completion in bundle]

        done: dict[int, int] = {}

        def answered(index: int) -> None:
            done[index] = len(prompts[index])
            if on_progress is not None:
                on_progress(sum(done.values()), len(asked))

        jobs = [
            Job(group[0].name, len(group[0].prompt_ids), sum(one.limit for one in group), len(bundles(group)))
            for group in prompts
        ]
        found = self._run(jobs, complete, answered)
        return filled(requests, asked, [completion for group in found for completion in group])

    def plain_logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """One pass over each sequence, as if all but its last token were a prompt."""
        return self._score(sequences, own_tokens())

    def top_logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], most: int) -> list[list[Likely]]:
        """Of (prompt, completion) pairs, for every place of the completion: the `most` likeliest tokens there and their
        log-probabilities under the model's own distribution, the likeliest first."""
        return self._score(sequences, likeliest_tokens(most))

    def _score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], scoring: Scoring[T]) -> list[list[T]]:
        async def score(server: int, client: httpx.AsyncClient, index: int) -> list[T]:
            prompt, completion = sequences[index]
            connection = self._connections[server]
            (choice,) = await connection.choices(client, scoring.asked(prompt, completion))
            try:
                return scoring.read(choice, len(prompt), completion)
            except NO_PLACES as error:
                raise connection.malformed(f"no {scoring.what} ({error!r})") from error

        jobs = [Job(f"sequence {index}", len(prompt) + len(rest), 1) for index, (prompt, rest) in enumerate(sequences)]
        return self._run(jobs, score, None)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Through files."""
        self._homes.forget()
        self._servers.load(weights)

    def rest(self) -> bool:
        """They have memory of their own, and stay awake."""
        return False

    def close(self) -> None:
        """Whoever started the servers stops them."""

    def figures(self) -> dict[str, float]:
        """What each server did so far: completion tokens, most tokens outstanding at once, times started again."""
        found: dict[str, float] = {}
        rows = zip(self._tokens, self._homes.most_outstanding, self._servers.restarts(), strict=True)
        for number, (tokens, outstanding, restarts) in enumerate(rows, start=1):
            prefix = f"server_{number}"
            found |= {
                f"{prefix}/tokens": float(tokens),
                f"{prefix}/most_outstanding_tokens": float(outstanding),
                f"{prefix}/restarts": float(restarts),
            }
        return found

    def _run(
        self,
        jobs: Sequence[Job],
        ask: Callable[[int, httpx.AsyncClient, int], Coroutine[Any, Any, list[T]]],
        on_answer: Callable[[int], None] | None,
    ) -> list[list[T]]:
        async def together() -> list[list[T]]:
            async with AsyncExitStack() as stack:
                clients = [
                    await stack.enter_async_context(one.client(self._homes.questions_at_once))
                    for one in self._connections
                ]
                asking: Asking[list[T]] = _Asking(self._servers, self._connections, clients, ask)
                spread = Round(self._homes, jobs, asking, on_answer)
                answers = await spread.run()
                for index, server in spread.by.items():
                    self._tokens[server] += _tokens_of(answers[index])
                return answers

        return asyncio.run(together())


class _Asking(Generic[T]):
    """The servers as a `Round` needs them."""

    def __init__(
        self,
        servers: Servers,
        connections: Sequence[Connection],
        clients: Sequence[httpx.AsyncClient],
        ask: Callable[[int, httpx.AsyncClient, int], Coroutine[Any, Any, list[T]]],
    ) -> None:
        self.labels = [address.label for address in servers.addresses]
        self._servers, self._connections, self._clients, self._ask = servers, connections, clients, ask

    async def begin(self) -> dict[int, str]:
        return await asyncio.to_thread(self._servers.absent)

    async def ask(self, server: int, job: int) -> list[T]:
        return await self._ask(server, self._clients[server], job)

    async def revived(self, server: int, error: ServerFailure) -> str | None:
        while (reason := await asyncio.to_thread(self._servers.broke_off, server, error)) is None:
            if await self._connections[server].is_well(self._clients[server]):
                return None
            await asyncio.sleep(_POLL_SECONDS)
        return reason

    async def doubt(self, server: int) -> str | None:
        return await asyncio.to_thread(self._servers.doubt, server)


def _tokens_of(answer: Sequence[Any]) -> int:
    return sum(len(one.token_ids) for one in answer if isinstance(one, Completion))


async def _completions(
    connection: Connection, client: httpx.AsyncClient, asked: Sequence[Asked], parameters: dict[str, Any]
) -> list[Answer]:
    """Of one prompt, wholly by the weights of the moment."""
    body = {"prompt": asked[0].prompt_ids, "n": len(asked), **parameters}
    return [_answer(choice) for choice in await connection.choices(client, body)]


def _answer(choice: dict[str, Any]) -> Answer:
    logprobs = choice.get("logprobs")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    return Answer(choice.get("token_ids"), values, choice.get("finish_reason"))
