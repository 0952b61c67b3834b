"""Weights in parts, each of which is one broadcast to vLLM's servers, and what these are told of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

Part = list[tuple[str, Tensor]]

PART_BYTES = 2**30
"""A part ends with the tensor that makes it larger than this; trainer and servers cut alike."""
_BUFFERS = 2


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
