"""AdamW over the float32 tensors that a process keeps: whole parameters, or its slices of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from stages.training.config import TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, besides the number of steps, which is the same for all of them."""

_EPSILON = 1e-6
"""What torch's clipping adds to the norm."""
_SCALE = "rate_scale"


def build_adamw(trained: Mapping[str, nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101); weight decay on matrices only, learning rates as `rate_scale` says."""
    by_kind: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, one in trained.items():
        by_kind.setdefault((one.ndim < 2, config.rate_scale(name)), []).append(one)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": 0.0 if small else config.weight_decay, _SCALE: scale}
            for (small, scale), parameters in sorted(by_kind.items(), key=lambda item: item[0])
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.adam_epsilon,
        fused=True,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[_SCALE]


class Adam:
    """Clipping and the update of an optimizer step. Nothing here waits for the device."""

    def __init__(self, trained: Mapping[str, nn.Parameter], config: TrainingConfig) -> None:
        self.trained = dict(trained)
        self.max_norm = config.max_grad_norm
        self.optimizer = build_adamw(self.trained, config)
        self._norm: Tensor | None = None

    def gradients(self) -> list[Tensor]:
        """Of every trained tensor; zeros where nothing of the step reached it, as if it had been computed."""
        for parameter in self.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients together, over all processes' slices."""
        norm = get_total_norm(self.gradients())
        self._norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return self._norm

    def step(self, rate: float) -> None:
        """Clip by the norm measured last, update, forget the gradients."""
        if self.max_norm is not None:
            assert self._norm is not None, "the norm is measured before a step"
            self._clip(self._norm, self.max_norm)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.discard()

    def _clip(self, norm: Tensor, max_norm: float) -> None:
        """Where tensors are whole, the fused update divides by what clipping divides by: a pass over memory less."""
        if any(isinstance(one, DTensor) for one in self.trained.values()):
            clip_grads_with_norm_(self.trained.values(), max_norm, norm)
            return
        # what torch's own GradScaler sets on a fused optimizer
        optimizer: Any = self.optimizer
        optimizer.grad_scale = ((norm + _EPSILON) / max_norm).clamp(min=1.0)
        optimizer.found_inf = torch.zeros_like(norm)

    def discard(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def moments(self, name: str) -> dict[str, Tensor]:
        """The state of one tensor; empty before its first step."""
        state = self.optimizer.state.get(self.trained[name], {})
        return {key: state[key] for key in MOMENTS if key in state}

    def set_moments(self, name: str, moments: Mapping[str, Tensor], steps: int) -> None:
        """Go on as after `steps` steps."""
        device = self.trained[name].device
        self.optimizer.state[self.trained[name]] = {
            "step": torch.tensor(float(steps), device=device),
            **{key: moments[key] for key in MOMENTS},
        }
