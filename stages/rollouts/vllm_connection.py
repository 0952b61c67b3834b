"""One server of vLLM over HTTP: what is sent, what is believed of its answers, and the words for what is not."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from artifacts.errors import StageError

_HEALTH_SECONDS = 10.0


@cache
def _trusted() -> ssl.SSLContext:
    """For https; read once, for it takes longer than many an answer."""
    return httpx.create_ssl_context()


class ServerFailure(StageError):
    """A server broke off, refused a connection or failed inside; another one, or itself later, may answer."""

    may_pass = True


class ServerRefusal(ServerFailure):
    """It did answer, with an error of its own."""


class ServerSilence(StageError):
    """A server did not answer in time."""

    may_pass = True


@dataclass(frozen=True)
class Address:
    """Where a server listens, and under which name it serves the model."""

    name: str
    url: str = "http://vllm"
    socket: Path | None = None
    """A socket file in the place of the URL's host."""
    key: str | None = field(default=None, repr=False)
    """Sent as a bearer token, told to nobody."""
    label: str = "the vLLM server"
    """In messages."""
    adapter: str | None = None
    """What completions are asked of, and what weights are for, where that is an adapter on the model."""
    hint: str = "its log may say why"
    """Where to look, in messages."""

    @property
    def asked(self) -> str:
        """The name that completions are asked for under."""
        return self.adapter or self.name


class Connection:
    """To one server."""

    def __init__(self, address: Address, timeout_seconds: float) -> None:
        self.address, self._timeout = address, timeout_seconds

    def client(self, connections: int) -> httpx.AsyncClient:
        """For `choices`, a context manager."""
        socket = self.address.socket
        return httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(
                verify=_trusted(),
                uds=None if socket is None else str(socket),
                limits=httpx.Limits(max_connections=connections),
            ),
            base_url=self.address.url,
            headers=self._headers(),
            timeout=self._timeout,
        )

    async def choices(self, client: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
        """As many as were asked for, in order."""
        forms = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        return await self._chosen(client, "/v1/completions", {**forms, **body}, body.get("n", 1))

    async def generations(self, client: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The same of vLLM's interface of tokens, whose answers say by which weights each was made; a server has it
        that was started with --enable-scale-out."""
        return await self._chosen(client, "/inference/v1/generate", body, body["sampling_params"]["n"])

    async def _chosen(
        self, client: httpx.AsyncClient, path: str, body: dict[str, Any], count: int
    ) -> list[dict[str, Any]]:
        try:
            response = await client.post(path, json={"model": self.address.asked, **body})
        except httpx.HTTPError as error:
            raise self._unreachable(error, "complete a prompt") from error
        values = self._values(response, "complete a prompt")
        if values.get("model") != self.address.asked:
            raise self.malformed(f"an answer of model {values.get('model')!r} in the place of {self.address.asked!r}")
        choices = values.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise self.malformed("no list of completions")
        if sorted(str(choice.get("index")) for choice in choices) != sorted(map(str, range(count))):
            raise self.malformed(f"{len(choices)} completions where {count} were asked for")
        return sorted(choices, key=lambda choice: int(choice["index"]))

    def names(self) -> list[str]:
        """Of the models that it serves, adapters left out."""
        return [name for name, is_adapter in self._served() if not is_adapter]

    def check_name(self) -> None:
        """Raises StageError where it serves another model."""
        if self.address.name not in (names := self.names()):
            raise StageError(f"{self.address.label} serves {', '.join(names) or 'nothing'}, not {self.address.name}")

    def take_weights(self, folder: Path) -> None:
        """Have it read the files there, and forget what it computed with the weights before."""
        self.read_weights(folder)
        self.forget_prefixes()

    def read_weights(self, folder: Path) -> None:
        """Have it read the files there, and no more."""
        if self.address.adapter is None:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self.post("/collective_rpc", body, "take new weights")
        else:
            self._take_adapter(self.address.adapter, folder)

    def name_weights(self, name: str) -> None:
        """What it calls its weights from now on, also in answers."""
        self.post("/update_weight_version", {"new_version": name}, "keep the version of its weights")

    def _take_adapter(self, name: str, folder: Path) -> None:
        """As one that was never there: of one that replaces another in place it would read the files at every step."""
        what = "take a LoRA adapter (--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 let it)"
        if (name, True) in self._served():
            self._tell("/v1/unload_lora_adapter", {"lora_name": name}, what)
        self._tell("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, what)

    def forget_prefixes(self) -> None:
        """Have it compute prompts anew. Raises StageError where it cannot."""
        if self.post("/reset_prefix_cache", None, "forget its prefix cache").get("success") is not True:
            raise StageError(
                f"{self.address.label} could not forget its prefix cache: it would go on from keys of old weights"
            )

    async def is_well(self, client: httpx.AsyncClient) -> bool:
        """Whether it answers now."""
        try:
            response = await client.get("/health", timeout=_HEALTH_SECONDS)
        except httpx.HTTPError:
            return False
        return response.status_code == httpx.codes.OK

    def get(self, path: str, what: str) -> dict[str, Any]:
        """JSON of an answer."""
        return self._read(lambda client: client.get(path), what)

    def post(self, path: str, body: dict[str, Any] | None, what: str) -> dict[str, Any]:
        """JSON of an answer; nothing is {}."""
        return self._read(lambda client: client.post(path, json=body), what)

    def _tell(self, path: str, body: dict[str, Any], what: str) -> None:
        """What it answers does not matter, unless it is an error."""
        self._believed(self._answered(lambda client: client.post(path, json=body), what), what)

    def _served(self) -> list[tuple[str, bool]]:
        """(name, whether it is an adapter) of all that it serves."""
        served = self.get("/v1/models", "name its models").get("data")
        entries = [entry for entry in served if isinstance(entry, dict)] if isinstance(served, list) else []
        return [(str(entry.get("id")), entry.get("parent") is not None) for entry in entries]

    def malformed(self, found: str) -> StageError:
        """An error."""
        known = "is it vLLM, and of a version we know?"
        return StageError(f"{self.address.label} gave {found}; {known} {self.address.hint}")

    def _headers(self) -> dict[str, str]:
        return {} if self.address.key is None else {"Authorization": f"Bearer {self.address.key}"}

    def _read(self, ask: Callable[[httpx.Client], httpx.Response], what: str) -> dict[str, Any]:
        return self._values(self._answered(ask, what), what)

    def _answered(self, ask: Callable[[httpx.Client], httpx.Response], what: str) -> httpx.Response:
        socket = None if self.address.socket is None else str(self.address.socket)
        with httpx.Client(
            transport=httpx.HTTPTransport(verify=_trusted(), uds=socket),
            base_url=self.address.url,
            headers=self._headers(),
            timeout=self._timeout,
        ) as client:
            try:
                return ask(client)
            except httpx.HTTPError as error:
                raise self._unreachable(error, what) from error

    def _believed(self, response: httpx.Response, what: str) -> httpx.Response:
        if response.status_code != httpx.codes.OK:
            kind = ServerRefusal if response.is_server_error else StageError
            raise kind(
                f"{self.address.label} would not {what}: status {response.status_code}, {response.text[:400]}; "
                f"{self.address.hint}"
            )
        return response

    def _values(self, response: httpx.Response, what: str) -> dict[str, Any]:
        if not self._believed(response, what).content:
            return {}
        try:
            values = response.json()
        except ValueError as error:
            raise self.malformed(f"no JSON: {response.text[:200]!r}") from error
        if not isinstance(values, dict):
            raise self.malformed(f"JSON of another form: {response.text[:200]!r}")
        return values

    def _unreachable(self, error: httpx.HTTPError, what: str) -> StageError:
        if isinstance(error, httpx.TimeoutException):
            return ServerSilence(
                f"{self.address.label} did not {what} within {self._timeout:g} s (rollouts.request_timeout_seconds); "
                f"{self.address.hint}"
            )
        return ServerFailure(f"{self.address.label} broke off where it was to {what} ({error!r})")
