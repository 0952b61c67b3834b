"""What a recipe says of an OpenEnv server beside its address."""

from __future__ import annotations

from typing import Literal

from stages.stage import Config

OPEN_ENV = "openenv"
"""The name of the environment that is behind an OpenEnv server."""


class OpenEnvParameters(Config):
    """Which environment a server has, and how text becomes its actions and its observations become text."""

    environment: str
    """Its name as the server gives it under /metadata: the address may change, what is trained on may not."""
    transport: Literal["websocket", "http"] = "websocket"
    """websocket: a session an episode, over /ws. http: POST /reset and /step, for servers that tell episodes apart by
    episode_id, or have one at a time."""
    action_field: str | None = None
    """Field of an action that the model's text goes into; null: the text is a whole action as JSON, or, where an action
    has one field, that field."""
    observation_field: str | None = None
    """Field of an observation that the model sees; null: all of it as JSON, or, where it has one field, that field."""
    reset_columns: tuple[str, ...] = ()
    """Columns of a row that /reset is given, beside the seed (of the row) and an episode_id."""
