"""The servers that a stage starts: with devices of their own, started again when they end, stopped with the stage.

What ends in the middle of a generation comes back with the weights of the moment: they stay in files beside the
servers' sockets, and a server is reached under its socket's name only once it has read them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from artifacts.errors import StageError
from stages.rollouts.engine import ServedModel
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.kept_folder import KeptFolder, remove_forgotten
from stages.rollouts.vllm_connection import Connection, ServerFailure, ServerRefusal
from stages.rollouts.vllm_in_flight import exchange, name_of
from stages.rollouts.vllm_seen_servers import SeenServers
from stages.rollouts.vllm_server import MODULE, VllmServer
from stages.rollouts.weight_files import WeightFiles, private_place

if TYPE_CHECKING:
    from stages.rollouts.vllm_transfer import NcclTransfer

_PREFIX = "posttrain-vllm-"
_LOOK_SECONDS = 0.2
_UNWELL_SECONDS = 10.0
"""So long a server may live without serving, before it is ended and started again."""


class OwnServers(SeenServers):
    """Starts them, and looks after them in threads."""

    def __init__(
        self,
        model: ServedModel,
        settings: EngineConfig,
        logs: Path,
        say: Callable[[str], None],
        module: str = MODULE,
        transfer: NcclTransfer | None = None,
        log_name: str = "vllm",
    ) -> None:
        """`logs`: folder of their logs, named `log_name`; `transfer`: what carries weights, None for files. Raises
        StageError, after stopping all, where one never answers."""
        place = private_place(model.folder)
        remove_forgotten(place, _PREFIX)
        self._kept = KeptFolder(place, _PREFIX)
        super().__init__(self._kept.path, settings.servers, f"its log is in {logs}", model.adapter_name)
        self._model, self._settings, self._logs, self._say, self._module = model, settings, logs, say, module
        self._files, self._transfer = WeightFiles(self.folder / "weights", model.adapter), transfer
        self._log_name = log_name
        self._sent = 0
        self._loading, self._changing = threading.Lock(), threading.Lock()
        self._closing = threading.Event()
        self._restarts = [0] * self.count
        self._servers: list[VllmServer] = []
        self._watchers: list[threading.Thread] = []
        try:
            self._start_all()
        except BaseException:
            self.stop()
            raise

    def _start_all(self) -> None:
        for number in range(self.count):
            self._servers.append(self._new(number))
        with ThreadPoolExecutor(self.count) as pool:
            waiting = [pool.submit(self._servers[number].await_answer) for number in range(self.count)]
            problems = {number: one.exception() for number, one in enumerate(waiting)}
        for number, problem in problems.items():
            if isinstance(problem, StageError):
                raise StageError(f"{self.addresses[number].label} {problem}") from problem
            if problem is not None:
                raise problem
        for number, server in enumerate(self._servers):
            server.publish()
            watcher = threading.Thread(target=self._watch, args=(number,), name=f"watches vLLM {number}", daemon=True)
            self._watchers.append(watcher)
            watcher.start()

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Those that are being started again take them before they serve. Raises StageError where one refuses."""
        with self._loading:
            self._sent += 1
            if self._transfer is None:
                self._load_files(weights)
            else:
                self._transfer_weights(self._transfer, weights)
            self.weights_name = name_of(self.run, self._sent)

    def _load_files(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._files.write(weights)
        serving = [number for number, server in enumerate(self._servers) if server.socket.exists()]
        with ThreadPoolExecutor(self.count) as pool:
            list(pool.map(self._give_weights, serving))
        if not self._settings.max_restarts:
            self._files.remove()

    def _transfer_weights(self, transfer: NcclTransfer, weights: Iterable[tuple[str, Tensor]]) -> None:
        gone = self.absent()
        there = [self._connection(number) for number in range(self.count) if number not in gone]
        if self._settings.changes_in_flight:
            transfer.send_amid(weights, there, name_of(self.run, self._sent))
        else:
            transfer.send(weights, there)

    def _give_weights(self, number: int) -> None:
        server = self._servers[number]
        try:
            self._hand_over(self._connection(number))
        except ServerFailure as error:
            state = server.state()
            if server.has_ended():
                return  # whoever watches it starts it again
            if isinstance(error, ServerRefusal):
                raise
            self._say(f"{error}; {state}")
            server.stop()  # or it would serve the weights before

    def _hand_over(self, connection: Connection) -> None:
        if self._settings.changes_in_flight:
            exchange(connection, self._files.folder, name_of(self.run, self._sent))
        else:
            connection.take_weights(self._files.folder)

    def restarts(self) -> list[int]:
        """How often each was started again."""
        return list(self._restarts)

    def stop(self) -> None:
        """End all, and wait until nothing of them is left."""
        with self._changing:
            self._closing.set()
        with ThreadPoolExecutor(self.count) as pool:
            list(pool.map(VllmServer.stop, self._servers))
        for watcher in self._watchers:
            watcher.join()
        self._kept.remove()

    def _new(self, number: int) -> VllmServer:
        settings = self._settings
        log = self._logs / (f"{self._log_name}.log" if self.count == 1 else f"{self._log_name}-{number + 1}.log")
        return VllmServer(
            self._model,
            settings,
            log,
            folder=self.folder / str(number),
            name=self.folder.name,
            devices=settings.devices_of(number),
            module=self._module,
        )

    def _watch(self, number: int) -> None:
        try:
            self._look_after(number)
        except Exception as error:  # or those who wait for the server would wait for ever
            self._tell_gone(number, f"it was not started again: {error!r}")
            raise

    def _look_after(self, number: int) -> None:
        """Until the stage ends, or the server ends once too often."""
        while True:
            reason = self._await_end(number)
            if self._closing.is_set():
                return
            label, most = self.addresses[number].label, self._settings.max_restarts
            if self._restarts[number] >= most:
                self._tell_gone(number, f"{reason}\nit was started again {most} times (rollouts.max_restarts)")
                return
            self._restarts[number] += 1
            self._say(f"{label}: {reason}\nit is started again, {self._restarts[number]} of {most} times")
            try:
                self._start_again(number)
            except StageError as error:
                self._say(f"{label} {error}")
                self._servers[number].stop()

    def _await_end(self, number: int) -> str:
        """How it ended; one that lives without serving is ended."""
        server, well = self._servers[number], time.monotonic()
        while not server.has_ended() and not self._closing.wait(_LOOK_SECONDS):
            if time.monotonic() - well < 1:
                continue
            if server.is_well():
                well = time.monotonic()
            elif time.monotonic() - well > _UNWELL_SECONDS:
                server.stop()
                return f"it lived for {_UNWELL_SECONDS:g} s without serving; {server.state()}"
        return "" if self._closing.is_set() else server.state()

    def _start_again(self, number: int) -> None:
        with self._changing:
            if self._closing.is_set():
                return
            server = self._servers[number] = self._new(number)
        server.await_answer()
        with self._loading:
            if self._files.exist:
                self._hand_over(self._connection(number, server.unready_socket))
            server.publish()

    def _connection(self, number: int, socket: Path | None = None) -> Connection:
        known = self.addresses[number]
        address = known if socket is None else replace(known, socket=socket)
        return Connection(address, self._settings.request_timeout_seconds)

    def _tell_gone(self, number: int, reason: str) -> None:
        note = self._note(number)
        draft = note.with_suffix(".draft")
        draft.write_text(reason, encoding="utf-8")
        draft.rename(note)  # another process sees all of it or nothing
