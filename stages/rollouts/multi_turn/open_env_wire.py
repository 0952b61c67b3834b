"""The messages of an OpenEnv server, over a WebSocket or HTTP."""

from __future__ import annotations

import json
import uuid
from contextlib import suppress
from typing import Any, Protocol

import httpx

_OF_THE_MODEL = ("VALIDATION_ERROR", "INVALID_JSON")
"""Codes of errors that an action is to blame for."""


class Refused(Exception):
    """The server does not take an action."""


class BrokenSession(Exception):
    """The server cannot go on, or answers something else."""


class Session(Protocol):
    """One episode's connection."""

    def reset(self, data: dict[str, Any]) -> dict[str, Any]:
        """{observation, reward, done}. Raises BrokenSession."""
        ...

    def step(self, action: dict[str, Any]) -> dict[str, Any]:
        """{observation, reward, done}. Raises Refused for an action that is none, and BrokenSession."""
        ...

    def close(self) -> None:
        """Leave."""
        ...


class WebSocketSession:
    """A session of its own on the server."""

    def __init__(self, url: str, timeout_seconds: float | None) -> None:
        from websockets.sync.client import connect

        self._timeout = timeout_seconds
        address = f"ws{url.removeprefix('http')}/ws"
        self._socket = connect(address, open_timeout=timeout_seconds, max_size=None, proxy=None)

    def reset(self, data: dict[str, Any]) -> dict[str, Any]:
        """See `Session`."""
        return self._asked({"type": "reset", "data": data})

    def step(self, action: dict[str, Any]) -> dict[str, Any]:
        """See `Session`."""
        return self._asked({"type": "step", "data": action})

    def close(self) -> None:
        """See `Session`."""
        with suppress(Exception):  # the server may be gone
            self._socket.send(json.dumps({"type": "close"}))
            self._socket.close()

    def _asked(self, message: dict[str, Any]) -> dict[str, Any]:
        from websockets.exceptions import ConnectionClosed

        with suppress(ConnectionClosed):  # what it said before may tell why
            self._socket.send(json.dumps(message))
        try:
            answer = json.loads(self._socket.recv(timeout=self._timeout))
        except ConnectionClosed as error:
            raise BrokenSession(f"the OpenEnv server closed the session: {error}") from error
        except ValueError as error:
            raise BrokenSession(f"the OpenEnv server answered no JSON: {error}") from error
        data = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(data, dict):
            raise BrokenSession(f"the OpenEnv server answered {answer!r:.200}")
        if answer.get("type") == "error":
            code, said = data.get("code"), str(data.get("message"))
            if code in _OF_THE_MODEL:
                raise Refused(said)
            raise BrokenSession(f"the OpenEnv server says {code}: {said}")
        return _checked(data)


class HttpSession:
    """An episode_id in every request."""

    def __init__(self, url: str, timeout_seconds: float | None) -> None:
        self._client = httpx.Client(base_url=url, timeout=timeout_seconds, trust_env=False)
        self._episode = uuid.uuid4().hex

    def reset(self, data: dict[str, Any]) -> dict[str, Any]:
        """See `Session`."""
        return self._asked("/reset", {"episode_id": self._episode, **data})

    def step(self, action: dict[str, Any]) -> dict[str, Any]:
        """See `Session`."""
        return self._asked("/step", {"action": action, "episode_id": self._episode})

    def close(self) -> None:
        """See `Session`."""
        self._client.close()

    def _asked(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._client.post(path, json=body)
        if answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY and path == "/step":
            raise Refused(f"the environment does not take this action: {answer.text[:200]}")
        if answer.is_error:
            raise BrokenSession(
                f"the OpenEnv server answers POST {path} with {answer.status_code}: {answer.text[:200]}"
            )
        try:
            return _checked(answer.json())
        except ValueError as error:
            raise BrokenSession(f"the OpenEnv server answered no JSON: {error}") from error


def _checked(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict) or "observation" not in data:
        raise BrokenSession(f"the OpenEnv server answered {data!r:.200}, without an observation")
    return data
