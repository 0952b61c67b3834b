"""Chat completions of an OpenAI-compatible server, with tries and waits. The key reaches no message."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from artifacts.errors import RequestError
from artifacts.sealed import scrub

if TYPE_CHECKING:
    import httpx

_PASSING = frozenset({408, 409, 425, 429})
"""Status codes, besides those from 500 on, after which another try may do."""
_LONGEST_WAIT_SECONDS = 60.0


class JudgeError(Exception):
    """A judge gave no verdict; the message reads on after the name of the reward."""


@dataclass(frozen=True)
class Retries:
    """Tries of one request."""

    max_tries: int
    backoff_seconds: float

    def wait_seconds(self, failures: int, asked: str | None) -> float:
        """The wait after so many failures; `asked`: the server's Retry-After."""
        try:
            seconds = float(asked or "")
        except ValueError:
            seconds = self.backoff_seconds * 2 ** (failures - 1)
        return min(max(seconds, 0.0), _LONGEST_WAIT_SECONDS)


def address_in(variable: str) -> str:
    """The server's address in an environment variable, in its one spelling: without user, password and query."""
    url = urlsplit(os.environ.get(variable, "").strip())
    return f"{url.scheme}://{url.netloc.rpartition('@')[2].lower()}{url.path.rstrip('/')}"


def unset_variables(environment: Mapping[str, str], url_variable: str, key_variable: str | None) -> dict[str, str]:
    """Parameter -> what is wrong with the environment variable that it names, whose value is not said."""
    base_url, wrong = environment.get(url_variable, ""), {}
    if urlsplit(base_url).scheme not in ("http", "https"):
        wrong["base_url_variable"] = (
            f"reward judge asks the server in the environment variable {url_variable}, which "
            f"{'holds no http address' if base_url else 'is not set'}; set it to one like http://localhost:8000/v1"
        )
    key = None if key_variable is None else environment.get(key_variable, "").strip()
    if key is not None and not (key and key.isascii() and key.isprintable()):
        wrong["api_key_variable"] = (
            f"reward judge takes its key from the environment variable {key_variable}, which "
            f"{'holds characters that no key has' if key else 'is not set'}; set it, or give api_key_variable: "
            "null for a server without keys"
        )
    return wrong


class JudgeServer:
    """One server, reached by connections that stay open; a context manager."""

    def __init__(self, base_url: str, key: str | None, request_seconds: float, retries: Retries) -> None:
        self._url, self._key = base_url.rstrip("/") + "/chat/completions", key
        self._seconds, self._retries = request_seconds, retries
        self._client: httpx.AsyncClient | None = None

    @classmethod
    def from_environment(
        cls, url_variable: str, key_variable: str | None, request_seconds: float, retries: Retries
    ) -> JudgeServer:
        """Raises RequestError when a variable is not set."""
        for wrong in unset_variables(os.environ, url_variable, key_variable).values():
            raise RequestError(wrong)
        key = None if key_variable is None else os.environ[key_variable].strip()
        return cls(os.environ[url_variable], key, request_seconds, retries)

    async def __aenter__(self) -> JudgeServer:
        import httpx

        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        self._client = httpx.AsyncClient(headers=headers, timeout=self._seconds)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._client is not None
        await self._client.aclose()

    async def reply(self, body: Mapping[str, Any]) -> str:
        """What the model says. Raises JudgeError when every try failed, or one that no further try mends."""
        import httpx

        assert self._client is not None
        for failures in range(1, self._retries.max_tries + 1):
            asked = None
            try:
                response = await self._client.post(self._url, json=dict(body))
            except httpx.TransportError as error:
                failed = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return self._content(response)
                failed = f"status {response.status_code}: {scrub(response.text)[:300]}"
                if response.status_code < 500 and response.status_code not in _PASSING:
                    raise self._error(failed)
                asked = response.headers.get("Retry-After")
            if failures < self._retries.max_tries:
                await asyncio.sleep(self._retries.wait_seconds(failures, asked))
        raise self._error(f"{failed} (tries: {self._retries.max_tries})")

    def _content(self, response: httpx.Response) -> str:
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise self._error(f"a reply without choices[0].message.content: {scrub(response.text)[:300]}")
        return content

    def _error(self, text: str) -> JudgeError:
        host = urlsplit(self._url).hostname
        said = text if self._key is None else text.replace(self._key, "***")
        return JudgeError(f"got no answer of the judge at {host}: {said}")
