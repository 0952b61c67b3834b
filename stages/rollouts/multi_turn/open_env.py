"""Environments behind an OpenEnv server (github.com/huggingface/OpenEnv).

A session is a WebSocket at /ws. The client sends {"type": "reset", "data": {...}}, {"type": "step", "data": action} and
{"type": "close"}; the server answers {"type": "observation", "data": {observation, reward, done}}, or {"type": "error",
"data": {message, code}}. Over HTTP the same stand in POST /reset and POST /step {"action": action}. GET /metadata and
GET /schema say which environment it is and what its actions hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from artifacts.errors import StageError
from stages.rollouts.multi_turn.environment import Stepped
from stages.rollouts.multi_turn.open_env_settings import OpenEnvParameters
from stages.rollouts.multi_turn.open_env_wire import HttpSession, Refused, Session, WebSocketSession
from stages.seeds import derive

_START_SECONDS = 10.0
_BASE_FIELDS = frozenset({"metadata", "reward", "done"})
"""Of OpenEnv's own classes of actions and observations."""
_CONVERTED: dict[str, Callable[[str], Any]] = {
    "integer": int,
    "number": float,
    "boolean": lambda text: {"true": True, "false": False}[text.lower()],
}
"""Type of a JSON schema -> a value of it from text."""


@dataclass(frozen=True)
class OpenEnvServer:
    """A server, asked once what it serves."""

    url: str
    parameters: OpenEnvParameters
    timeout_seconds: float | None
    action_field: str | None
    action_type: str
    observation_field: str | None

    @classmethod
    def of(cls, url: str, parameters: dict[str, Any], timeout_seconds: float | None) -> OpenEnvServer:
        """Raises StageError where no server answers, or it serves another environment."""
        settings = OpenEnvParameters.model_validate(parameters)
        found = _asked(url, "/metadata").get("name")
        if found != settings.environment:
            raise StageError(
                f"the OpenEnv server at {url} has environment {found!r}, the recipe asks for {settings.environment!r}; "
                "correct url, or parameters.environment"
            )
        schemas = _asked(url, "/schema")
        action = _fields(schemas.get("action"))
        observation = _fields(schemas.get("observation"))
        field = _chosen(settings.action_field, action, "action")
        return cls(
            url.rstrip("/"),
            settings,
            timeout_seconds,
            field,
            str(action.get(field, {}).get("type", "string")) if field is not None else "object",
            _chosen(settings.observation_field, observation, "observation"),
        )

    def session(self) -> OpenEnv:
        """An environment of one episode."""
        return OpenEnv(self)

    def connect(self) -> Session:
        """What carries its messages."""
        kind = WebSocketSession if self.parameters.transport == "websocket" else HttpSession
        return kind(self.url, self.timeout_seconds)

    def action(self, text: str) -> dict[str, Any]:
        """The action that a turn stands for. Raises ValueError where its text is none."""
        if self.action_field is not None:
            convert = _CONVERTED.get(self.action_type, str)
            try:
                return {self.action_field: convert(text.strip() if convert is not str else text)}
            except (ValueError, KeyError) as error:
                raise ValueError(f"{self.action_field} must be of type {self.action_type}") from error
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("an action is a JSON object")
        return found

    def shown(self, observation: Any) -> str:
        """An observation as text."""
        if self.observation_field is not None and isinstance(observation, dict):
            observation = observation[self.observation_field]
        return observation if isinstance(observation, str) else json.dumps(observation, ensure_ascii=False)


class OpenEnv:
    """One episode on the server. What is no action is answered with the reason, as the server's refusals are."""

    def __init__(self, server: OpenEnvServer) -> None:
        self._server = server
        self._session: Session | None = None

    def reset(self, row: dict[str, Any]) -> str:
        """Begin. All completions of a row have its seed, so that they begin alike."""
        self._session = self._server.connect()
        given = {name: row.get(name) for name in self._server.parameters.reset_columns}
        data = self._session.reset({"seed": derive(0, "openenv", row["row_id"]) % 2**31, **given})
        return self._server.shown(data["observation"])

    def step(self, action: str) -> Stepped:
        """A turn."""
        assert self._session is not None, "reset comes first"
        try:
            data = self._session.step(self._server.action(action))
        except (ValueError, Refused) as error:
            return f"error: {error}", None, False
        return self._server.shown(data["observation"]), data.get("reward"), bool(data.get("done", False))

    def close(self) -> None:
        """End the session."""
        if self._session is not None:
            self._session.close()


def _asked(url: str, path: str) -> dict[str, Any]:
    try:
        answer = httpx.get(url.rstrip("/") + path, timeout=_START_SECONDS, trust_env=False)
        answer.raise_for_status()
        found = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise StageError(
            f"no OpenEnv server answers GET {path} at {url} ({type(error).__name__}: {error}); start it, or correct url"
        ) from error
    return found if isinstance(found, dict) else {}


def _fields(schema: Any) -> dict[str, Any]:
    """Field -> its schema, without OpenEnv's own."""
    properties = schema.get("properties", {}) if isinstance(schema, dict) else {}
    return {name: one for name, one in properties.items() if name not in _BASE_FIELDS}


def _chosen(wanted: str | None, fields: dict[str, Any], what: str) -> str | None:
    if wanted is None:
        return next(iter(fields)) if len(fields) == 1 else None
    if wanted not in fields:
        raise StageError(
            f"parameters.{what}_field is {wanted!r}, but an {what} of the OpenEnv server has {', '.join(fields)}"
        )
    return wanted
