"""The NCCL group of a trainer and the workers of vLLM's servers: how it is met, and what is sent in it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.rollouts.vllm_connection import Address

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


def free_port(address: str) -> int:
    """One that nothing listens on at that address of this machine."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
