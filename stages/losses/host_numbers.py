"""Numbers that the host knows, where they are computed with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def on_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The values on a device. The host does not wait there, as `torch.tensor(values, device=device)` does on a GPU:
    until all is computed that was asked for before."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def beside(values: Sequence[Any], like: Tensor) -> Tensor:
    """In the type of another tensor and on its device; as `new_tensor`, but without waiting."""
    return on_device(values, like.device, like.dtype)
