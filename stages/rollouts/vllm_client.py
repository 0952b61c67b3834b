"""An engine behind a vLLM server: completions over HTTP, weights by a folder that both can read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from safetensors.torch import save_file
from torch import Tensor

from artifacts.errors import StageError
from stages.context import require_disk
from stages.rollouts.engine import ServedModel
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.requests import Completion, Progress, SampleRequest, SamplingConfig
from stages.rollouts.vllm_requests import Answer, Asked, Reading, bundles, filled, parameters, stop_tokens, wanted

T = TypeVar("T")

REQUESTS_AT_ONCE = 256
"""More wait on this side; vLLM runs as many together by default."""
_FILE_BYTES = 2**30
"""Tensors are written so many bytes at a time, so that a whole model is never there once more in memory."""


@dataclass(frozen=True)
class Address:
    """Where a server listens, and under which name it serves the model."""

    name: str
    url: str = "http://vllm"
    socket: Path | None = None
    """A socket file in the place of the URL's host."""


class ServerEngine:
    """An `Engine` that asks a server. `state` says how the server is, for messages."""

    def __init__(
        self,
        address: Address,
        model: ServedModel,
        settings: EngineConfig,
        *,
        weights: Path,
        state: Callable[[], str],
    ) -> None:
        """`weights`: a folder for new weights, which the server can read. Raises StageError where it serves another
        model."""
        self._address, self._model, self._settings = address, model, settings
        self._weights, self._state = weights, state
        self._check_model()

    def sample(
        self, requests: Sequence[SampleRequest], settings: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """For every request its completions, in the order of its seeds: a question a prompt, many at once."""
        asked, stops = wanted(requests, settings.max_completion_length), stop_tokens(self._model, settings)
        reading = Reading(self._model, settings, stops, "the vLLM server")
        done = 0

        async def complete(client: httpx.AsyncClient, together: list[Asked]) -> list[Completion]:
            nonlocal done
            body = {"prompt": together[0].prompt_ids, "n": len(together), **parameters(together[0], settings, stops)}
            choices = await self._choices(client, body)
            done += len(together)
            if on_progress is not None:
                on_progress(done, len(asked))
            return [reading.completion(one, _answer(choice)) for one, choice in zip(together, choices, strict=True)]

        found = self._all(complete, bundles(asked))
        return filled(requests, asked, [completion for together in found for completion in together])

    def plain_logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """One pass over each sequence as if it were a prompt."""

        async def score(client: httpx.AsyncClient, sequence: tuple[Sequence[int], Sequence[int]]) -> list[float]:
            prompt, completion = sequence
            body = {"prompt": [*prompt, *completion], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
            (choice,) = await self._choices(client, body)
            try:
                places = choice["prompt_logprobs"][len(prompt) :]
                return [float(place[str(token)]["logprob"]) for place, token in zip(places, completion, strict=True)]
            except (KeyError, TypeError, ValueError) as error:
                raise self._malformed(f"no log-probabilities of a prompt's tokens ({error!r})") from error

        return self._all(score, sequences)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Through files, which are removed when the server has read them."""
        self._weights.mkdir(exist_ok=True)
        try:
            for number, part in enumerate(_parts(weights)):
                require_disk(self._weights, sum(one.nbytes for one in part.values()), "weights for the vLLM server")
                save_file(part, self._weights / f"part-{number:05d}.safetensors")
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(self._weights)}}
            self._post("/collective_rpc", body, "take new weights")
        finally:
            for path in self._weights.glob("*.safetensors"):
                path.unlink()
        if self._post("/reset_prefix_cache", None, "forget its prefix cache").get("success") is not True:
            raise StageError(
                "the vLLM server could not forget its prefix cache: it would go on from keys of old weights"
            )

    def rest(self) -> bool:
        """It has memory of its own, and stays awake."""
        return False

    def close(self) -> None:
        """Whoever started the server stops it."""

    def _check_model(self) -> None:
        served = self._read(lambda client: client.get("/v1/models"), "name its models").get("data")
        names = [entry.get("id") for entry in served if isinstance(entry, dict)] if isinstance(served, list) else []
        if self._address.name not in names:
            raise StageError(
                f"the vLLM server serves {', '.join(map(str, names)) or 'nothing'}, not {self._address.name}"
            )

    def _all(self, ask: Callable[[httpx.AsyncClient, Any], Coroutine[Any, Any, T]], items: Sequence[Any]) -> list[T]:
        """Of every item, in order. The first failure ends all."""

        async def together() -> list[T]:
            turn = asyncio.Semaphore(REQUESTS_AT_ONCE)
            async with httpx.AsyncClient(
                transport=httpx.AsyncHTTPTransport(
                    uds=None if self._address.socket is None else str(self._address.socket),
                    limits=httpx.Limits(max_connections=REQUESTS_AT_ONCE),
                ),
                base_url=self._address.url,
                timeout=self._settings.request_timeout_seconds,
            ) as client:

                async def one(item: Any) -> T:
                    async with turn:
                        return await ask(client, item)

                return await asyncio.gather(*map(one, items))

        return asyncio.run(together())

    async def _choices(self, client: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
        """As many as were asked for, in order."""
        forms = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        try:
            response = await client.post("/v1/completions", json={"model": self._address.name, **forms, **body})
        except httpx.HTTPError as error:
            raise self._unreachable(error, "complete a prompt") from error
        values = self._values(response, "complete a prompt")
        if values.get("model") != self._address.name:
            raise self._malformed(f"an answer of model {values.get('model')!r} in the place of {self._address.name!r}")
        choices, count = values.get("choices"), body.get("n", 1)
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise self._malformed("no list of completions")
        if sorted(str(choice.get("index")) for choice in choices) != sorted(map(str, range(count))):
            raise self._malformed(f"{len(choices)} completions where {count} were asked for")
        return sorted(choices, key=lambda choice: int(choice["index"]))

    def _post(self, path: str, body: dict[str, Any] | None, what: str) -> dict[str, Any]:
        return self._read(lambda client: client.post(path, json=body), what)

    def _read(self, ask: Callable[[httpx.Client], httpx.Response], what: str) -> dict[str, Any]:
        socket = None if self._address.socket is None else str(self._address.socket)
        timeout = self._settings.request_timeout_seconds
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=socket), base_url=self._address.url, timeout=timeout
        ) as client:
            try:
                response = ask(client)
            except httpx.HTTPError as error:
                raise self._unreachable(error, what) from error
        return self._values(response, what)

    def _values(self, response: httpx.Response, what: str) -> dict[str, Any]:
        if response.status_code != httpx.codes.OK:
            raise StageError(
                f"the vLLM server would not {what}: status {response.status_code}, {response.text[:400]}; "
                f"{self._state()}"
            )
        if not response.content:
            return {}
        try:
            values = response.json()
        except ValueError as error:
            raise self._malformed(f"no JSON: {response.text[:200]!r}") from error
        if not isinstance(values, dict):
            raise self._malformed(f"JSON of another form: {response.text[:200]!r}")
        return values

    def _malformed(self, found: str) -> StageError:
        return StageError(f"the vLLM server gave {found}; is it vLLM, and of a version we know? {self._state()}")

    def _unreachable(self, error: httpx.HTTPError, what: str) -> StageError:
        if isinstance(error, httpx.TimeoutException):
            limit = self._settings.request_timeout_seconds
            return StageError(
                f"the vLLM server did not {what} within {limit:g} s (rollouts.request_timeout_seconds); {self._state()}"
            )
        return StageError(f"the vLLM server broke off where it was to {what} ({error!r}): {self._state()}")


def _answer(choice: dict[str, Any]) -> Answer:
    logprobs = choice.get("logprobs")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    return Answer(choice.get("token_ids"), values, choice.get("finish_reason"))


def _parts(weights: Iterable[tuple[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    for name, tensor in weights:
        if part and sum(one.nbytes for one in part.values()) + tensor.nbytes > _FILE_BYTES:
            yield part
            part = {}
        # tied weights are one memory under two names, which safetensors refuses
        part[name] = tensor.detach().cpu().contiguous().clone()
    if part:
        yield part
