"""Model FLOPs of training and what share of the machine's peak they are (MFU; PaLM, arXiv:2204.02311, appendix B)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from artifacts.errors import StageError
from stages.training.trunk import text_parameters

PEAK_VARIABLE = "POSTTRAIN_PEAK_TFLOPS"
"""TFLOP/s of one device (or of this machine's processors) in the precision of the training, where the user knows it."""

_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("H200", 989.4, 66.9),
    ("H100 PCIe", 756.0, 51.2),
    ("H100 NVL", 835.5, 60.0),
    ("H100", 989.4, 66.9),
    ("A100", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("L4", 121.0, 30.3),
    ("RTX 4090", 165.2, 82.6),
)
"""(part of the device's name, dense bfloat16, float32) in TFLOP/s by the makers; the first that fits."""


@dataclass(frozen=True)
class Utilization:
    """What a token costs, and what one device could do in a second; None: not known."""

    flops_of_token: float | None
    peak_flops: float | None

    @classmethod
    def of(cls, models: Sequence[Any], bf16: bool) -> Utilization:
        """Of models that are about to be trained on this machine, on the same tokens. Raises StageError for a peak that
        is no number."""
        flops = [flops_per_token(model) for model in models]
        known = [one for one in flops if one is not None]
        return cls(sum(known) if len(known) == len(flops) else None, peak_flops(bf16))

    def measure(self, tokens: int, seconds: float, processes: int) -> dict[str, float]:
        """`tflops_per_second` over all processes, and `mfu`, its share of the peak; what is not known is left out."""
        if self.flops_of_token is None:
            return {}
        rate = self.flops_of_token * tokens / max(seconds, 1e-9)
        found = {"tflops_per_second": rate / 1e12}
        if self.peak_flops is not None:
            devices = processes if torch.cuda.is_available() else 1  # the processors of a machine are shared
            found["mfu"] = rate / (self.peak_flops * devices)
        return found


def flops_per_token(model: Any) -> float | None:
    """Operations of a forward and a backward pass over one token: 2 of a weight forward, 2 backward for what flows
    through it and 2 for its own gradient, where it is trained. The look-up of embeddings and attention's products of
    activations are left out, so the true number is larger.

    None where weights alone do not tell: experts of which few work, packed quantized weights.
    """
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    if any(getattr(model.config.get_text_config(), name, None) for name in names):
        return None
    looked_up = _looked_up(model)
    total = 0.0
    for parameter in text_parameters(model):
        if not parameter.is_floating_point():
            return None
        if parameter is not looked_up:
            total += parameter.numel() * (6.0 if parameter.requires_grad else 4.0)
    return total


def _looked_up(model: Any) -> Any:
    """The embedding, unless it is the head as well."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    return None if tied else embedding.weight


def peak_flops(bf16: bool) -> float | None:
    """Operations a second that one device of this process can do at most; None: not known. Raises StageError."""
    given = os.environ.get(PEAK_VARIABLE)
    if given is not None:
        return _number(given) * 1e12
    return peak_of(torch.cuda.get_device_name(), bf16) if torch.cuda.is_available() else None


def _number(given: str) -> float:
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise StageError(f"{PEAK_VARIABLE} is {given!r}; give the peak of one device in TFLOP/s, or leave it out")
    return number


def peak_of(device: str, bf16: bool) -> float | None:
    """Of a GPU by its name."""
    for part, half, full in _PEAKS:
        if part in device:
            return (half if bf16 else full) * 1e12
    return None
