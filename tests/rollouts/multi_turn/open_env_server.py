"""A small server that speaks OpenEnv's protocol: sessions over a WebSocket, /reset and /step over HTTP, /metadata,
/schema and /state. Its environment guesses at a number: the seed modulo 10, or `number` of the reset."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse

from tests.waiting import LIMIT_SECONDS

ACTION = {"properties": {"metadata": {"type": "object"}, "guess": {"type": "integer"}}, "required": ["guess"]}
OBSERVATION = {
    "properties": {
        "done": {"type": "boolean"},
        "reward": {},
        "metadata": {},
        "hint": {"type": "string"},
        "step_count": {"type": "integer"},
    }
}


class Guessing:
    """One episode on the server."""

    def __init__(self) -> None:
        self.number, self.steps, self.given = 0, 0, {}  # type: ignore[var-annotated]

    def reset(self, given: dict[str, Any]) -> dict[str, Any]:
        self.given = given
        self.number = given.get("number") or given["seed"] % 10
        return {"observation": {"hint": "begin", "step_count": 0}, "reward": None, "done": False}

    def step(self, action: dict[str, Any]) -> dict[str, Any]:
        guess = action["guess"]
        self.steps += 1
        if guess == 666:
            raise RuntimeError("on fire")
        hint = "right" if guess == self.number else "higher" if guess < self.number else "lower"
        observation = {"hint": hint, "step_count": self.steps}
        return {"observation": observation, "reward": float(hint == "right"), "done": hint == "right"}


def app(sessions: list[Guessing], most: int) -> FastAPI:
    """`sessions`: all that there ever were. `most`: sessions at once."""
    made, episodes, now = FastAPI(), dict[str, Guessing](), [0]

    @made.get("/metadata")
    def metadata() -> Any:
        return {"name": "guessing", "description": "guess", "version": "1"}

    @made.get("/schema")
    def schema() -> Any:
        return {"action": ACTION, "observation": OBSERVATION, "state": {}}

    @made.post("/reset")
    def reset(body: dict[str, Any]) -> Any:
        episodes[body["episode_id"]] = Guessing()
        sessions.append(episodes[body["episode_id"]])
        return sessions[-1].reset(body)

    @made.post("/step")
    def step(body: dict[str, Any]) -> Any:
        if not isinstance(body["action"].get("guess"), int):
            return JSONResponse({"detail": [{"msg": "guess must be an integer"}]}, 422)
        try:
            return episodes[body["episode_id"]].step(body["action"])
        except RuntimeError as error:
            return JSONResponse({"detail": str(error)}, 500)

    @made.websocket("/ws")
    async def session(socket: WebSocket) -> None:
        await socket.accept()
        now[0] += 1
        try:
            if now[0] > most:
                await socket.send_json(_error("no more sessions", "CAPACITY_REACHED"))
                await socket.close()
                return
            sessions.append(Guessing())
            await _talk(socket, sessions[-1])
        except WebSocketDisconnect:
            pass
        finally:
            now[0] -= 1

    return made


async def _talk(socket: WebSocket, episode: Guessing) -> None:
    while (message := json.loads(await socket.receive_text()))["type"] != "close":
        if message["type"] == "reset":
            await socket.send_json({"type": "observation", "data": episode.reset(message["data"])})
        elif not isinstance(message["data"].get("guess"), int):
            await socket.send_json(_error("Invalid message", "VALIDATION_ERROR"))
        else:
            try:
                await socket.send_json({"type": "observation", "data": episode.step(message["data"])})
            except RuntimeError as error:
                await socket.send_json(_error(str(error), "EXECUTION_ERROR"))


def _error(message: str, code: str) -> dict[str, Any]:
    return {"type": "error", "data": {"message": message, "code": code}}


@contextmanager
def served(most: int = 100) -> Iterator[tuple[str, list[Guessing]]]:
    """(its address, the sessions so far)"""
    sessions: list[Guessing] = []
    server = uvicorn.Server(uvicorn.Config(app(sessions, most), host="127.0.0.1", port=0, log_level="error"))
    started = threading.Event()
    startup = server.startup

    async def start(*arguments: Any, **named: Any) -> None:
        await startup(*arguments, **named)
        started.set()

    server.startup = start  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(LIMIT_SECONDS)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", sessions
    finally:
        server.should_exit = True
        thread.join()
