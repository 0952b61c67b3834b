"""Servers that somebody else runs: reached by their URLs, given weights by a folder that they and the stage see.

They are told which version of whose weights they have, so that one that was started again meanwhile, or that another
run has given weights, is noticed: what it answered is asked of another one.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from artifacts.errors import StageError
from stages.rollouts.engine import ServedModel
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.vllm_connection import Address, Connection, ServerFailure, ServerRefusal, ServerSilence
from stages.rollouts.vllm_in_flight import exchange, go_on, name_of
from stages.rollouts.vllm_requests import FORM_READER
from stages.rollouts.weight_files import WeightFiles

if TYPE_CHECKING:
    from stages.rollouts.vllm_transfer import NcclTransfer

_POLL_SECONDS = 0.5
_CONFIG = "config.json"
_FORM = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_HINT = "its log may say why; one that was started with a model of another form takes no weights of this one"
_OTHER_WEIGHTS = "it has other weights than this run sent: it was started again, or another run uses it"


class GivenServers:
    """They are awaited and looked at first; the weights of the moment are those of the newest version."""

    def __init__(
        self,
        settings: EngineConfig,
        model: ServedModel,
        files: WeightFiles,
        run: str,
        say: Callable[[str], None],
        transfer: NcclTransfer | None = None,
    ) -> None:
        """`run`: names it among all that may use the servers; `transfer`: what carries weights, None for files. Raises
        StageError where one cannot serve this run."""
        self._transfer = transfer
        self._files, self.run, self._say = files, run, say
        self._ours = f"{run}-"
        """How names of its weights begin."""
        self._in_flight = settings.changes_in_flight
        key = _key(settings.api_key_variable)
        found = [
            Address("", url, key=key, label=f"the vLLM server at {url}", adapter=model.adapter_name, hint=_HINT)
            for url in settings.urls
        ]
        deadline = time.monotonic() + settings.start_timeout_seconds
        timeout = settings.request_timeout_seconds
        self.addresses = [_looked_at(address, model, timeout, deadline) for address in found]
        self._connections = [Connection(address, timeout) for address in self.addresses]
        for connection in self._connections:
            self._wake(connection)
        self._sent = 0
        self.weights_name = ""
        """Of the newest ones, when they were last looked for."""
        self._changing = threading.Lock()
        """Held while some may have other weights than others."""

    def _wake(self, connection: Connection) -> None:
        """A run that was killed as it gave weights in flight leaves a server that takes requests and answers none."""
        if connection.get("/is_paused", "say whether it is paused").get("is_paused"):
            self._say(f"{connection.address.label} was paused, as a run that is killed leaves it; it goes on")
            go_on(connection)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """To each; one that is not there is left out until the next ones. Raises StageError where one refuses them."""
        with self._changing:
            self._sent += 1
            self._give(weights, name := name_of(self.run, self._sent))
            self.weights_name = name

    def _give(self, weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        if self._transfer is not None:
            there = [one for one in self._connections if not isinstance(_version_of(one), StageError)]
            send = self._transfer.send_amid if self._in_flight else self._transfer.send
            send(weights, there, version)
            return
        try:
            self._files.write(weights)
            lost = self._of_all(lambda connection: self._send(connection, version))
        finally:
            self._files.remove()
        reasons = [reason for reason in lost if reason is not None]
        if len(reasons) == len(self._connections):
            lost_all = ConnectionError(f"{len(reasons)} servers")
            raise StageError("no vLLM server took new weights\n" + "\n".join(reasons)) from lost_all
        for reason in reasons:
            self._say(f"{reason}; it gets no prompts until it takes new weights again")

    def absent(self) -> dict[int, str]:
        """Those without the newest weights that a server has of this run."""
        with self._changing:
            versions = self._of_all(_version_of)
            of_run = [version for version in versions if isinstance(version, str) and version.startswith(self._ours)]
            self.weights_name = max(of_run, default=self._ours)
            problems = {number: _problem(version, self.weights_name) for number, version in enumerate(versions)}
        return {number: problem for number, problem in problems.items() if problem is not None}

    def broke_off(self, server: int, error: ServerFailure) -> str | None:
        """It is asked again if it is there, with its weights."""
        problem = self.doubt(server)
        return None if problem is None else f"{error}; {problem}"

    def doubt(self, server: int) -> str | None:
        """Whether it still has the weights that it had."""
        with self._changing:
            return _problem(_version_of(self._connections[server]), self.weights_name)

    def restarts(self) -> list[int]:
        """Nobody here starts them."""
        return [0] * len(self.addresses)

    def _send(self, connection: Connection, version: str) -> str | None:
        """Why it could not be reached; None: it has them."""
        try:
            if self._in_flight:
                exchange(connection, self._files.folder, version)
            else:
                connection.take_weights(self._files.folder)
                connection.name_weights(version)
        except ServerRefusal:
            raise
        except (ServerFailure, ServerSilence) as error:
            return str(error)
        return None

    def _of_all(self, ask: Callable[[Connection], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self._connections)) as pool:
            return list(pool.map(ask, self._connections))


def _version_of(connection: Connection) -> str | StageError:
    try:
        found = connection.get("/weight_info", "say which weights it has").get("weight_version")
    except (ServerFailure, ServerSilence) as error:
        return error
    return str(found)


def _problem(version: str | StageError, expected: str) -> str | None:
    if isinstance(version, StageError):
        return str(version)
    return None if version == expected else _OTHER_WEIGHTS


def _key(variable: str | None) -> str | None:
    key = None if variable is None else os.environ.get(variable, "").strip()
    if key is not None and not (key and key.isascii() and key.isprintable()):
        raise StageError(
            f"rollouts.api_key_variable names {variable}, which "
            f"{'holds characters that no key has' if key else 'is not set'}; set it in the environment of the stage"
        )
    return key


def _looked_at(address: Address, model: ServedModel, timeout: float, deadline: float) -> Address:
    """With the name that it serves its model under. Raises StageError for settings that give other numbers."""
    connection = Connection(address, timeout)
    _await(connection, deadline)
    names = connection.names()
    if len(names) != 1:
        raise StageError(
            f"{address.label} serves {', '.join(names) or 'no model'}; a server for rollouts serves one, under one name"
        )
    told = connection.get("/server_info?config_format=json", "tell its settings (VLLM_SERVER_DEV_MODE=1 lets it)")
    try:
        found = told["vllm_config"]["model_config"]
        has = {name: str(found[name]).removeprefix("torch.") for name in ("logprobs_mode", "dtype")}
    except (KeyError, TypeError) as error:
        raise connection.malformed(f"settings of another form ({error!r})") from error
    for name, needed in {"logprobs_mode": "processed_logprobs", "dtype": model.dtype}.items():
        if has[name] != needed:
            option = name.replace("_", "-")
            raise StageError(f"{address.label} has {name} {has[name]}; start it with --{option} {needed}")
    if model.structured:
        _require_form_reader(address, told["vllm_config"])
    _require_same_form(address, Path(str(found.get("model"))), model)
    return replace(address, name=names[0])


def _require_form_reader(address: Address, told: dict[str, Any]) -> None:
    """Other readers take grammars too, and make something else of them. Raises StageError."""
    found = (told.get("structured_outputs_config") or {}).get("backend")
    if found != FORM_READER:
        raise StageError(
            f"{address.label} reads forms (structured) with {found}; start it with "
            f'--structured-outputs-config \'{{"backend": "{FORM_READER}"}}\''
        )


def _require_same_form(address: Address, folder: Path, model: ServedModel) -> None:
    """Where the server's folder is here as well: weights that do not fit would leave it without any. Raises
    StageError."""
    if not folder.is_absolute() or not (folder / _CONFIG).is_file():
        return
    theirs, ours = (json.loads((one / _CONFIG).read_text(encoding="utf-8")) for one in (folder, model.folder))
    for name in _FORM:
        if ours.get(name) != theirs.get(name):
            raise StageError(
                f"{address.label} serves another model: its {name} is {theirs.get(name)}, here it is {ours.get(name)}; "
                "start it with a model of this stage's architecture"
            )


def _await(connection: Connection, deadline: float) -> None:
    while True:
        try:
            connection.get("/health", "say whether it is well")
            return
        except (ServerFailure, ServerSilence) as error:
            if time.monotonic() > deadline:
                raise StageError(f"{error}; it did not answer within rollouts.start_timeout_seconds") from error
        time.sleep(_POLL_SECONDS)
