"""Weights from the trainer's GPU to those of vLLM's servers over NCCL, by vLLM's own interface for it.

What is said, and in which order (vLLM 0.32, `vllm.distributed.weight_transfer`): /init_weight_transfer_engine once; for
new weights /start_weight_update, an /update_weights for each part with names, types and shapes, /finish_weight_update.
The tensors of a part are one broadcast of their bytes from rank 0, while /update_weights is being answered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.rollouts.vllm_connection import Address, Connection, ServerSilence
from stages.rollouts.vllm_in_flight import between_tokens
from stages.rollouts.vllm_nccl_group import Group, OpenGroup, address_towards, free_port
from stages.rollouts.vllm_weight_parts import init_info, packed, parts, update_info

T = TypeVar("T")
_POLL_SECONDS = 0.001


class NcclTransfer:
    """The way to some servers: they form one group with the trainer, another one when they are others."""

    def __init__(self, dtype: torch.dtype, timeout_seconds: float, open_group: OpenGroup) -> None:
        """`dtype`: what the servers compute in; weights are sent as it."""
        self._dtype, self._timeout, self._open = dtype, timeout_seconds, open_group
        self._group: Group | None = None
        self._members: list[Address] = []

    def send(
        self, weights: Iterable[tuple[str, Tensor]], connections: Sequence[Connection], version: str | None = None
    ) -> None:
        """To all of the servers, which forget what they computed with others, and call them this version. Raises
        StageError where one fails."""
        self._send(weights, connections, version)
        for connection in connections:
            connection.forget_prefixes()

    def send_amid(self, weights: Iterable[tuple[str, Tensor]], connections: Sequence[Connection], version: str) -> None:
        """The same in the middle of whatever they are asked, with which they go on, over what they computed."""
        with between_tokens(connections):
            self._send(weights, connections, version)

    def _send(
        self, weights: Iterable[tuple[str, Tensor]], connections: Sequence[Connection], version: str | None
    ) -> None:
        if not connections:
            raise StageError("no vLLM server is there to take new weights; their logs may say why")
        group = self._group_with(connections)
        self._ask_all(connections, "/start_weight_update", None, "begin with new weights")
        try:
            for part in parts(weights, self._dtype):
                asked = _asked(connections, "/update_weights", {"update_info": update_info(part)}, "take new weights")
                self._await(asked, group.broadcast(packed(part)))
        except BaseException:
            self.close()  # a broadcast may wait in it for ever
            raise
        named = None if version is None else {"weight_version": version}
        self._ask_all(connections, "/finish_weight_update", named, "finish with new weights")

    def close(self) -> None:
        """Leave the group."""
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _group_with(self, connections: Sequence[Connection]) -> Group:
        members = [connection.address for connection in connections]
        if self._group is None or members != self._members:
            self.close()
            self._group, self._members = self._meet(connections), members
        return self._group

    def _meet(self, connections: Sequence[Connection]) -> Group:
        self._ask_all(connections, "/shutdown_weight_transfer_engine", None, "leave the group that it was in")
        sizes = [_world_size(connection) for connection in connections]
        address, size = address_towards([one.address for one in connections]), 1 + sum(sizes)
        port = free_port(address)
        asked = [
            _begin(
                connection.post,
                "/init_weight_transfer_engine",
                {"init_info": init_info(address, port, size, rank_offset=1 + sum(sizes[:number]))},
                "join the trainer for new weights",
            )
            for number, connection in enumerate(connections)
        ]
        opened = _begin(self._open, address, port, size)
        self._await([*asked, opened])
        return opened.result()

    def _ask_all(self, connections: Sequence[Connection], path: str, body: dict[str, Any] | None, what: str) -> None:
        self._await(_asked(connections, path, body, what))

    def _await(self, asked: Sequence[Future[Any]], is_sent: Callable[[], bool] = lambda: True) -> None:
        """Until all is done. A server that refuses does not come to the broadcast, which would wait for it for ever."""
        deadline = time.monotonic() + self._timeout
        while not (all(one.done() for one in asked) and is_sent()):
            for one in asked:
                if one.done():
                    one.result()
            if time.monotonic() > deadline:
                raise ServerSilence(
                    f"the vLLM servers did not get new weights over NCCL within {self._timeout:g} s "
                    "(rollouts.request_timeout_seconds); their logs may say why"
                )
            time.sleep(_POLL_SECONDS)
        for one in asked:
            one.result()


def _world_size(connection: Connection) -> int:
    size = connection.get("/get_world_size", "say how many GPUs it is on").get("world_size")
    if not isinstance(size, int) or size < 1:
        raise connection.malformed(f"{size!r} for the number of its workers")
    return size


def _asked(
    connections: Sequence[Connection], path: str, body: dict[str, Any] | None, what: str
) -> list[Future[dict[str, Any]]]:
    return [_begin(connection.post, path, body, what) for connection in connections]


def _begin(call: Callable[..., T], *given: Any) -> Future[T]:
    """In a thread that nothing waits for at the end of the process."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*given))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
