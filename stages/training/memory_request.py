"""What a stage is asked to predict its memory for, and what its forward passes come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.sharding import Whole
from stages.training.adapter_settings import APART
from stages.training.memory_allocator import Device
from stages.training.memory_shape import ModelShape
from stages.training.memory_training import Setup, Training

_FLOAT = 4


@dataclass(frozen=True)
class Request:
    """What a stage is asked to predict its memory for."""

    config: Any
    models: Mapping[str, ModelShape]
    """The model behind every wired input that takes some; of a list `name.1` is the second one's."""
    wired: frozenset[str]
    """Names of all wired inputs."""
    setup: Setup

    @property
    def model(self) -> ModelShape:
        """Of input `model`."""
        return self.models["model"]

    def several(self, name: str) -> list[ModelShape]:
        """Of an input that takes a list."""
        return [shape for key, shape in self.models.items() if key.partition(".")[0] == name]

    @property
    def longest(self) -> int:
        """Most tokens of a row: max_length, where the model takes as many."""
        return min(int(self.config.max_length), self.model.context)

    @property
    def training(self) -> Training:
        """Input `model` in training."""
        return Training.of(self.config, self.model, self.setup)

    def passes(self, *, row: int, rows: int, read: int | None = None) -> Passes:
        """The largest forward pass under `micro_batch_tokens`, for so many rows of at most so many tokens."""
        return passes(self.config.micro_batch_tokens, row=row, rows=rows, processes=self.setup.processes, read=read)

    @property
    def reference_is_policy(self) -> bool:
        """Whether the reference is the policy without its adapters, or with them as they came."""
        return self.came_with_policy and "reference" not in self.models

    @property
    def came_with_policy(self) -> bool:
        """Whether the model as it came is the policy without its adapters, or with them as they came."""
        return self.training.adapters is not None and isinstance(self.setup.sharding, Whole)

    @property
    def kept_adapters(self) -> float:
        """Bytes of the copy of an adapter as it came that is the reference's: the policy moves away from it."""
        return self.came_adapters if self.reference_is_policy else 0.0

    @property
    def came_adapters(self) -> float:
        """Bytes of such a copy, where the model as it came is the policy with that."""
        apart = getattr(self.config, "init_lora_weights", "default") in APART
        goes_on = self.came_with_policy and (apart or self.model.adapters is not None)
        return float(self.training.trained * self.training.weight) if goes_on else 0.0

    def following(self, shape: ModelShape) -> float:
        """Bytes of a model that follows the policy: in float32, and where passes are in bfloat16 a copy for them."""
        return float(shape.parameters * (_FLOAT + (2 if getattr(self.config, "bf16", False) else 0)))

    def frozen(self, *shapes: ModelShape | None) -> float:
        """Bytes of these models' weights, which are not trained."""
        bf16 = bool(getattr(self.config, "bf16", False))
        return sum(frozen_bytes(shape, self.setup.device, bf16=bf16) for shape in shapes if shape is not None)


@dataclass(frozen=True)
class Passes:
    """The forward passes of a process: the largest, and how many make an optimizer step."""

    tokens: int
    read: int
    """Positions that are read: asked-for tokens, or last tokens for a reward."""
    longest: int
    """Tokens of the longest row."""
    count: int = 1


def passes(budget: int, *, row: int, rows: int, processes: int = 1, read: int | None = None) -> Passes:
    """The most that `rows` rows (groups with a shared prefix) of at most `row` tokens come to under a token budget.

    A row is never split, so it may be larger than the budget.
    """
    share = -(-rows // processes) * row
    tokens = max(min(budget, share), row)
    return Passes(tokens, tokens if read is None else min(read, tokens), row, max(1, -(-share // tokens)))


def frozen_bytes(shape: ModelShape, device: Device, *, bf16: bool) -> float:
    """Of weights that are not trained. They are rounded where they were loaded, so in a CPU's memory there were once
    those in float32."""
    return float(shape.parameters * (2 if bf16 and device == "cuda" else _FLOAT))
