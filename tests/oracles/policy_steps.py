"""A step of TRL's on-line trainers on given tokens: their own loss methods, on an object that has what they read."""

from __future__ import annotations

import inspect
import textwrap
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

DEFAULTS: dict[str, Any] = {
    # settings of GRPOConfig that the loss reads from the trainer itself
    "beta": 0.0,
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "max_completion_length": 8,
    "use_vllm": False,
    "vllm_importance_sampling_correction": False,
}
ARGUMENTS: dict[str, Any] = {
    # and from its arguments
    "delta": None,
    "use_bias_correction_kl": False,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "steps_per_generation": 1,
    "entropy_coef_min": 0.0,
    "entropy_coef_max": 1.0,
    "entropy_coef_delta": 0.005,
    "entropy_target": 0.2,
}


class OneProcess:
    """What the trainers ask of accelerate."""

    num_processes = 1
    sync_gradients = True

    def gather(self, values: Tensor) -> Tensor:
        return values

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        return values

    def pad_across_processes(self, values: Tensor, **_: Any) -> Tensor:
        return values


class Trainer:
    """Of a class of TRL's, without its model, its sampler and its training."""

    def __init__(self, kind: Any, logprobs_BT: Tensor, entropies_BT: Tensor, **settings: Any) -> None:
        own = {name: settings.pop(name) for name in list(settings) if name in ARGUMENTS}
        vars(self).update(DEFAULTS | settings)
        self.args = SimpleNamespace(**(ARGUMENTS | own))
        self.kind, self.read = kind, (logprobs_BT, entropies_BT, None)
        self.accelerator, self.model = OneProcess(), SimpleNamespace(training=True)
        self.current_gradient_accumulation_steps = 1
        self.aux_loss_enabled = False
        self._entropy_bonus_enabled = self.entropy_coef > 0 or self.use_adaptive_entropy
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}

    def __getattr__(self, name: str) -> Any:
        method = inspect.getattr_static(self.__dict__["kind"], name)
        return method.__func__ if isinstance(method, staticmethod) else method.__get__(self)

    def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        return self.read

    def loss(self, inputs: dict[str, Tensor]) -> Tensor:
        """The trainer's loss of these tokens."""
        mask = inputs["completion_mask"]
        prompt = torch.ones(len(mask), 1, dtype=torch.long)
        fixed = {"prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": mask, "num_items_in_batch": mask.sum()}
        loss: Tensor = self.kind._compute_loss(self, None, fixed | inputs)
        return loss


def run_part(function: Any, first: str, last: str, **known: Any) -> dict[str, Any]:
    """What the lines of a function from the one that starts with `first` to before the one that starts with `last`
    leave behind, given the names that they read."""
    lines = inspect.getsource(function).splitlines()
    starts = [index for index, line in enumerate(lines) if line.strip().startswith(first)]
    start = starts[0]
    stop = next(index for index in range(start, len(lines)) if lines[index].strip().startswith(last))
    names = {**inspect.getmodule(function).__dict__, **known}  # type: ignore[union-attr]
    exec(textwrap.dedent("\n".join(lines[start:stop])), names)
    return names
