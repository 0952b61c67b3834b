"""bitsandbytes' AdamW with moments in 8 bits, without its waiting for the GPU after every tensor that it updates."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch


def adamw_8bit(
    groups: Sequence[dict[str, Any]], rate: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.Optimizer:
    """Of these groups of parameters. The library waits for moments that are paged, which these are not: kernels of one
    stream come one after the other."""
    library: Any = importlib.import_module("bitsandbytes.optim")
    kind: Any = type("AdamW8bitWithoutWaiting", (library.AdamW8bit,), {"step": _step})
    optimizer: torch.optim.Optimizer = kind(groups, rate, betas, epsilon)
    return optimizer


@torch.no_grad()
def _step(self: Any, closure: None = None) -> None:
    if not self.initialized:
        self.check_overrides()
        self.to_gpu()
        self.initialized = True
    for number, group in enumerate(self.param_groups):
        for place, parameter in enumerate(group["params"]):
            if parameter.grad is not None:
                if not self.state[parameter]:
                    self.init_state(group, parameter, number, place)
                self.update_step(group, parameter, number, place)
