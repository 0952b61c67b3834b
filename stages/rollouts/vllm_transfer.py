"""Weights from the trainer's GPU to those of vLLM's servers over NCCL, by vLLM's own interface for it.

What is said, and in which order (vLLM 0.32, `vllm.distributed.weight_transfer`): /init_weight_transfer_engine once; for
new weights /start_weight_update, an /update_weights for each part with names, types and shapes, /finish_weight_update.
The tensors of a part are one broadcast of their bytes from rank 0, while /update_weights is being answered.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.rollouts.vllm_connection import Address, Connection, ServerSilence
from stages.rollouts.vllm_in_flight import between_tokens

T = TypeVar("T")
Part = list[tuple[str, Tensor]]

PART_BYTES = 2**30
"""A part ends with the tensor that makes it larger than this; trainer and servers cut alike."""
_BUFFERS = 2
_POLL_SECONDS = 0.001
_LOOPBACK = "127.0.0.1"


class Group(Protocol):
    """The trainer, as rank 0, and all workers of the servers."""

    def broadcast(self, packed: Tensor) -> Callable[[], bool]:
        """Begins to send it to all; the answer tells, as often as it is called, whether that is done."""
        ...

    def close(self) -> None:
        """Leaves the group."""
        ...


OpenGroup = Callable[[str, int, int], Group]
"""(the trainer's address, port, size of the group) -> the group, once all have come."""


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
        port = _free_port(address)
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


def init_info(address: str, port: int, size: int, *, rank_offset: int) -> dict[str, Any]:
    """What a server is told of the group; its first worker has rank `rank_offset`."""
    return {
        "master_address": address,
        "master_port": port,
        "rank_offset": rank_offset,
        "world_size": size,
        "packed": True,
        "packed_buffer_size_bytes": PART_BYTES,
        "packed_num_buffers": _BUFFERS,
    }


def update_info(part: Part) -> dict[str, list[Any]]:
    """What a server is told of a part."""
    return {
        "names": [name for name, _ in part],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in part],
        "shapes": [list(tensor.shape) for _, tensor in part],
    }


def parts(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[Part]:
    """One after the other, cut where vLLM cuts, so that each is one broadcast; floating-point tensors as `dtype`."""
    part: Part = []
    size = 0
    for name, tensor in weights:
        sent = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        part.append((name, sent))
        size += sent.nbytes
        if size > PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def packed(part: Part) -> Tensor:
    """[bytes] of its tensors, one behind the other."""
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in part])


def vllm_group() -> OpenGroup:
    """Opens groups on this process's GPU by vLLM's own helper. Raises StageError where there is no GPU or no vLLM."""
    if not torch.cuda.is_available():
        raise StageError("rollouts.weight_transfer nccl is between GPUs, and the trainer has none here; use folder")
    try:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init
    except ImportError as error:
        raise StageError(
            "rollouts.weight_transfer nccl takes vLLM in the environment of the stage as well, which has none "
            f"({error}); install it, or use folder"
        ) from error
    device = torch.cuda.current_device()

    def open_group(address: str, port: int, size: int) -> Group:
        torch.cuda.set_device(device)  # of this thread
        communicator = trainer_init({"master_address": address, "master_port": port, "world_size": size})
        if communicator.disabled:  # it would send nothing, and say nothing
            raise StageError("rollouts.weight_transfer nccl: vLLM finds no NCCL library here; use folder")
        return _NcclGroup(communicator, device)

    return open_group


class _NcclGroup:
    """A communicator of vLLM."""

    def __init__(self, communicator: Any, device: int) -> None:
        self._communicator, self._device = communicator, device
        self._sent: Tensor | None = None

    def broadcast(self, packed: Tensor) -> Callable[[], bool]:
        self._sent = packed.to(torch.device("cuda", self._device))  # kept until the next one
        self._communicator.broadcast(self._sent, src=0, stream=torch.cuda.current_stream())
        done = torch.cuda.Event()
        done.record()
        return done.query

    def close(self) -> None:
        self._communicator.destroy()  # which ends what still waits in it


def address_towards(addresses: Sequence[Address]) -> str:
    """Under which the servers reach this machine: on the loopback where all of them are here."""
    hosts = [_LOOPBACK if one.socket is not None else urlsplit(one.url).hostname or _LOOPBACK for one in addresses]
    found = [_own_address(host) for host in hosts]
    return next((address for address in found if not address.startswith("127.")), found[0])


def _own_address(host: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing: it only says which way it would go
        return str(probe.getsockname()[0])


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


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
