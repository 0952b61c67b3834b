"""The update of a step, over the tensors that a process keeps: whole parameters, or its slices of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from artifacts.errors import StageError
from stages.training.adamw_8bit import adamw_8bit
from stages.training.config import TrainingConfig
from stages.training.muon import Muon
from stages.training.processes import Processes
from stages.training.rounded_adamw import RoundedAdamW

Tensors = Mapping[str, nn.Parameter]

_EPSILON = 1e-6
"""What torch's clipping adds to the norm."""
_SCALE = "rate_scale"
_FOLLOWS = ("step", "RMS")
"""State that is not kept: it follows from the number of steps, or from the weights."""
_IN_LAYER = re.compile(r"\.\d+\.")
"""In the names of tensors that belong to one of a model's numbered layers."""


@dataclass(frozen=True)
class Part:
    """Tensors that have one optimizer. `begun`: what their state has, besides what is kept, after so many steps."""

    optimizer: torch.optim.Optimizer
    begun: Callable[[int, torch.device], dict[str, Any]]


class Optimization:
    """Clipping and the update of an optimizer step. Nothing here waits for the device."""

    def __init__(self, trained: Tensors, config: TrainingConfig, processes: Processes) -> None:
        self.trained = dict(trained)
        self.max_norm = config.max_grad_norm
        self.parts = OPTIMIZERS[config.optim](self.trained, config, processes)
        self._part_of = {one: part for part in self.parts for one in _parameters(part.optimizer)}
        self._norm: Tensor | None = None

    def gradients(self) -> list[Tensor]:
        """Of every trained tensor; zeros where nothing of the step reached it, as if it had been computed."""
        for parameter in self.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients together, over all processes' slices."""
        gradients = self.gradients()
        if gradients and gradients[0].dtype == torch.bfloat16:  # whose norms would be bfloat16 too
            gradients = [torch.linalg.vector_norm(one, dtype=torch.float32) for one in gradients]
        norm = get_total_norm(gradients)
        self._norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return self._norm

    def step(self, rate: float) -> None:
        """Clip by the norm measured last, update, forget the gradients."""
        if self.max_norm is not None:
            assert self._norm is not None, "the norm is measured before a step"
            self._clip(self._norm, self.max_norm)
        for part in self.parts:
            set_rate(part.optimizer, rate)
            part.optimizer.step()
        self.discard()

    def _clip(self, norm: Tensor, max_norm: float) -> None:
        """A fused update over whole tensors divides by what clipping divides by: a pass over memory less."""
        sliced = any(isinstance(one, DTensor) for one in self.trained.values())
        if sliced or not all(part.optimizer.defaults.get("fused") for part in self.parts):
            clip_grads_with_norm_(self.trained.values(), max_norm, norm)
            return
        for part in self.parts:
            # what torch's own GradScaler sets on a fused optimizer
            optimizer: Any = part.optimizer
            optimizer.grad_scale = ((norm + _EPSILON) / max_norm).clamp(min=1.0)
            optimizer.found_inf = torch.zeros_like(norm)

    def discard(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.optimizer.zero_grad(set_to_none=True)

    def moments(self, name: str) -> dict[str, Tensor]:
        """The state of one tensor; empty before its first step."""
        parameter = self.trained[name]
        state = self._part_of[parameter].optimizer.state.get(parameter, {})
        return {key: value for key, value in state.items() if key not in _FOLLOWS and isinstance(value, Tensor)}

    def set_moments(self, name: str, moments: Mapping[str, Tensor], steps: int) -> None:
        """Go on as after `steps` steps."""
        parameter = self.trained[name]
        part = self._part_of[parameter]
        part.optimizer.state[parameter] = {**part.begun(steps, parameter.device), **moments}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[_SCALE]


def build_adamw(trained: Tensors, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101); weight decay on matrices only, learning rates as `rate_scale` says."""
    return torch.optim.AdamW(
        _groups(trained, config), lr=config.learning_rate, betas=config.betas, eps=config.adam_epsilon, fused=True
    )


def _groups(trained: Tensors, config: TrainingConfig) -> list[dict[str, Any]]:
    by_kind: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, one in trained.items():
        is_vector = one.ndim < 2 or name.endswith("bias")  # experts have theirs in one tensor
        by_kind.setdefault((is_vector, config.rate_scale(name)), []).append(one)
    return [
        {"params": parameters, "weight_decay": 0.0 if is_vector else config.weight_decay, _SCALE: scale}
        for (is_vector, scale), parameters in sorted(by_kind.items(), key=lambda item: item[0])
    ]


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [one for group in optimizer.param_groups for one in group["params"]]


def _adamw(trained: Tensors, config: TrainingConfig, processes: Processes) -> list[Part]:
    if config.pure_bf16:
        names: dict[Tensor, str] = {one: name for name, one in trained.items()}
        settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.adam_epsilon}
        rounded = RoundedAdamW(_groups(trained, config), names, **settings, seed=config.seed)
        return [Part(rounded, lambda steps, device: {"step": steps})]
    optimizer = build_adamw(trained, config)
    return [Part(optimizer, lambda steps, device: {"step": torch.tensor(float(steps), device=device)})]


def _adamw_8bit(trained: Tensors, config: TrainingConfig, processes: Processes) -> list[Part]:
    """Moments in 8 bits, a scale for every 256 of them (Dettmers et al., arXiv:2110.02861); in float32 for tensors of
    no layer (embedding, head), as its section 2.3 has it, and for those of less than 4096 elements."""
    inside = {name: one for name, one in trained.items() if _IN_LAYER.search(name)}
    rest = {name: one for name, one in trained.items() if name not in inside}
    _require_some("adamw_8bit", inside, trained)
    low = adamw_8bit(_groups(inside, config), config.learning_rate, config.betas, config.adam_epsilon)
    return [Part(low, lambda steps, device: {"step": steps}), *(_adamw(rest, config, processes) if rest else [])]


def _adafactor(trained: Tensors, config: TrainingConfig, processes: Processes) -> list[Part]:
    """Adafactor (Shazeer and Stern, arXiv:1804.04235) at the learning rate that is given: the second moments of a
    matrix by its rows and columns, no first moments, updates of a root mean square of at most 1 times it."""
    from transformers.optimization import Adafactor

    optimizer = Adafactor(_groups(trained, config), lr=config.learning_rate, scale_parameter=False, relative_step=False)
    return [Part(optimizer, lambda steps, device: {"step": steps, "RMS": 0})]


def _muon(trained: Tensors, config: TrainingConfig, processes: Processes) -> list[Part]:
    """Muon for the matrices of layers, and AdamW for the rest."""
    matrices = {name: one for name, one in trained.items() if is_matrix_of_layer(name, one.ndim)}
    _require_some("muon", matrices, trained)
    rest = {name: one for name, one in trained.items() if name not in matrices}
    number = torch.bfloat16 if config.bf16 else torch.float32
    muon = Muon(_groups(matrices, config), momentum=config.muon_momentum, processes=processes, number=number)
    return [Part(muon, lambda steps, device: {}), *(_adamw(rest, config, processes) if rest else [])]


def _require_some(name: str, chosen: Tensors, trained: Tensors) -> None:
    if not chosen:
        raise StageError(f"optim {name} is for tensors of a model's layers; trained are only: {', '.join(trained)}")


def is_matrix_of_layer(name: str, dimensions: int) -> bool:
    """Whether a tensor of that name in a Scorer is a linear part of a layer, or all of its experts' as one stack."""
    linear = dimensions == (2 if name.endswith(".weight") else 3)
    return linear and _IN_LAYER.search(name) is not None


OPTIMIZERS: Mapping[str, Callable[[Tensors, TrainingConfig, Processes], list[Part]]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "muon": _muon,
}
"""`optim` -> what updates the trained tensors."""
