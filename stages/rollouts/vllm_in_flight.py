"""New weights amid what a server of vLLM is completing: it stops between two tokens, and goes on with them.

What it has computed with the weights before stays (PipelineRL, arXiv:2509.19128): a completion's later tokens are drawn
by the new weights over keys and values of the old ones, and just that is what their log-probabilities are of. Who is
asked later shares none of it: vLLM keeps prompts under the name of the weights that they were asked under
(`cache_salt`), for it cannot forget them while they are in use. Every answer says by which weights each of its tokens
was made; vLLM names them as it was told between stopping and going on, so no token is under a wrong name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import httpx

from artifacts.errors import StageError
from stages.rollouts.vllm_connection import Connection, ServerFailure
from stages.rollouts.vllm_requests import Answer, Asked

_NEITHER = "neither"
"""Weights of which it is not known how much of the new ones came."""
_SPANS = (KeyError, TypeError, AttributeError, ValueError)
"""What reading them raises where an answer has none."""


class Named(Protocol):
    """Servers that are told what their weights are called."""

    @property
    def run(self) -> str:
        """Of whom their weights are: the first part of the names."""
        ...

    @property
    def weights_name(self) -> str:
        """Of the newest that all of them have."""
        ...


def name_of(run: str, number: int) -> str:
    """Of the weights that a run sent as its `number`-th, counted from 1; those of one run sort by age."""
    return f"{run}-{number:09d}"


def exchange(connection: Connection, folder: Path, name: str) -> None:
    """Have the server go on with the weights of the files there, which are called `name`, in the middle of whatever it
    is asked."""
    with between_tokens([connection]):
        connection.read_weights(folder)
        connection.name_weights(name)


@contextmanager
def between_tokens(connections: Sequence[Connection]) -> Iterator[None]:
    """The servers make nothing while the block gives them weights and their name, and go on after it. What they make
    should it fail is under a name that nobody believes."""
    try:
        for connection in connections:
            # "keep" alone would have vLLM compute anew, with the new weights, all that is in the making
            connection.post("/pause?mode=keep&clear_cache=false", None, "pause for new weights")
            connection.name_weights(_NEITHER)
        yield
    except BaseException:
        for connection in connections:
            with suppress(StageError):
                go_on(connection)
        raise
    for connection in connections:
        go_on(connection)


def go_on(connection: Connection) -> None:
    """Have a server that was paused make completions again."""
    connection.post("/resume", None, "go on with new weights")


class Amid:
    """How completions are asked for whose weights may change before they end."""

    def __init__(self, servers: Named) -> None:
        self._servers = servers

    async def ask(
        self, connection: Connection, client: httpx.AsyncClient, asked: Sequence[Asked], parameters: dict[str, Any]
    ) -> list[Answer]:
        """Of one prompt, each with the numbers of the weights behind its tokens. Raises ServerFailure where they are of
        weights that the run did not send."""
        body = {
            "token_ids": asked[0].prompt_ids,
            "sampling_params": {**parameters, "n": len(asked)},
            "cache_salt": self._servers.weights_name,
        }
        choices = await connection.generations(client, body)
        return [_answer(choice, self._numbers(connection, choice)) for choice in choices]

    def _numbers(self, connection: Connection, choice: dict[str, Any]) -> list[int]:
        try:
            spans = [(str(span["version"]), int(span["start"]), int(span["end"])) for span in choice["weight_versions"]]
            bounds = [0, *(end for _, _, end in spans)]
            if [start for _, start, _ in spans] != bounds[:-1] or bounds[-1] != len(choice["token_ids"]):
                raise ValueError(f"of tokens {spans}")
        except _SPANS as error:
            found = f"completions that do not say by which weights their tokens were made ({error!r})"
            raise connection.malformed(found) from error
        return [number for name, start, end in spans for number in [self._number(connection, name)] * (end - start)]

    def _number(self, connection: Connection, name: str) -> int:
        run, _, number = name.rpartition("-")
        if run != self._servers.run or not number.isdecimal():
            raise ServerFailure(f"{connection.address.label} made tokens by weights {name!r}, which are not this run's")
        return int(number)


def _answer(choice: dict[str, Any], numbers: Sequence[int]) -> Answer:
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    entries = content if isinstance(content, list) else []
    values = [entry.get("logprob") if isinstance(entry, dict) else None for entry in entries]
    return Answer(choice.get("token_ids"), values, choice.get("finish_reason"), numbers)
