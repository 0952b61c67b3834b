"""How much memory a stage's process needs at most, and what for: arithmetic on sizes, without torch.

A stage passes through phases (a training step, a pass of its reference, sampling); its peak is that of the largest.
All numbers are bytes of one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stages.sharding import Whole
from stages.training.adapter_settings import APART
from stages.training.memory_activations import (
    Layers,
    attention_gradient_bytes,
    passing_bytes,
    saved_bytes,
    stream_bytes,
)
from stages.training.memory_adapters import Adapters
from stages.training.memory_allocator import ALLOCATOR_SHARE, Device, room_for, slack
from stages.training.memory_head import HeadUse, held_tensors, scoring_bytes
from stages.training.memory_shape import ModelShape
from stages.training.memory_training import Setup, Training

PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "head",
    "reference",
    "averages",
    "sampler",
    "engine",
    "checkpoint",
    "process",
)
"""What memory is for. `weights`: with float32 masters and gathered shards; `reference`: reference, teacher and
reward models; `averages`: what weight_averaging keeps, on a CPU; `engine`: vLLM, in the process or as the stage's
servers; `checkpoint`: what is gathered of slices to be written; `process`: Python and its libraries."""

_FLOAT = 4
PROCESS_BYTES: Mapping[Device, int] = {"cpu": 500_000_000, "cuda": 600_000_000}
"""Resident in a stage's process before it loads a model (CPU), or taken on the GPU by CUDA's context."""


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

    def frozen(self, *shapes: ModelShape | None) -> float:
        """Bytes of these models' weights, which are not trained."""
        bf16 = bool(getattr(self.config, "bf16", False))
        return sum(frozen_bytes(shape, self.setup.device, bf16=bf16) for shape in shapes if shape is not None)


@dataclass(frozen=True)
class Phase:
    """What is held at once at the worst moment of a part of a stage; only parts that are not zero."""

    name: str
    parts: Mapping[str, float]
    room: float | None = None
    """What it may have, where that is not what a process may: vLLM's share of a GPU, or its cache."""

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts.values())

    def with_parts(self, changed: Mapping[str, float]) -> Phase:
        """With these parts in the place of its own; parts in their order."""
        known = {**self.parts, **changed}
        return replace(self, parts={part: float(known[part]) for part in PARTS if known.get(part)})

    def filling(self, limit: float) -> float:
        """Share of its room that it takes, or of the `limit` of a process; it fits up to 1."""
        return self.total / (limit if self.room is None else self.room)


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


def training_step(training: Training, work: Passes, use: HeadUse, *, reference: float = 0) -> Phase:
    """A step, once the optimizer has its state. `reference`: other models that stay.

    The worst moment is one of five: in the head, with the activations of all layers; in the backward pass of the last
    attention; at the end of it, with all gradients; in the update; on a CPU, where a quantized model is written. What
    is whole adds the head's gradient to its own in place; with slices there is a second one in every later pass of a
    step, until its end.
    """
    shape, setup, layers = training.shape, training.setup, training.layers
    state = training.state()
    whole, several = isinstance(setup.sharding, Whole), work.count > 1
    held = held_tensors(
        shape,
        use,
        work.read,
        device=setup.device,
        compute=training.weight,
        frozen=not training.trains_head,
        in_place=whole and several and not training.bf16 and (use.together or setup.device == "cpu"),
    )
    head = room_for(held, setup.device) + training.widened_head
    saved = saved_bytes(layers, work.tokens, work.read, work.longest)
    inside = _activation_slack(shape, setup.device, work.tokens)
    streams = stream_bytes(layers, work.tokens)
    unpacked = training.dequantized
    before = state["gradients"] if several else 0.0
    embedding = shape.embedding_parameters * _FLOAT if layers.all_trained else 0
    apart = 0 if shape.classifier or (whole and several) else slack(embedding, setup.device) * embedding
    moments = [
        {"gradients": before, "activations": inside * (saved + streams) + unpacked, "head": head},
        {
            "gradients": before,
            "activations": inside * (saved + streams + attention_gradient_bytes(layers, work.tokens, work.read))
            + unpacked,
            "head": apart,
        },
        {
            "gradients": state["gradients"] + (embedding if several and not whole else 0),
            "activations": inside * streams + unpacked,
        },
        {"gradients": state["gradients"], "optimizer": state["optimizer"] + training.optimizer.update},
    ]
    if setup.device == "cpu" and training.exported:
        moments.append({"gradients": 0.0, "weights": state["weights"] + training.exported})
    worst = max(moments, key=lambda parts: sum({**state, **parts}.values()))
    # what is whole is written as it is
    gathers = setup.device == "cpu" and not whole
    copy = (training.trained * training.updated + training.optimizer.state) / setup.processes if gathers else 0
    if training.keeps_best and setup.device == "cpu":
        copy += training.trained * training.updated
    return phase("training step", {**state, **worst, "checkpoint": copy, "reference": reference}, setup)


def _activation_slack(shape: ModelShape, device: Device, tokens: int) -> float:
    """What is held of activations over what is in use: by the size of the largest."""
    return slack(_FLOAT * tokens * shape.intermediate, device)


def scoring(
    shape: ModelShape,
    setup: Setup,
    work: Passes,
    *,
    resident: Mapping[str, float] | None = None,
    own: str | None = "weights",
    bf16: bool = False,
) -> Phase:
    """A pass without gradients beside what is `resident`. `own`: the part that the model's own weights go to; None:
    they are among what is resident."""
    layers = Layers(shape, 2 if bf16 else _FLOAT, setup.device)
    beside = 1 + ALLOCATOR_SHARE[setup.device]
    held = dict(resident or {})
    if own is not None:
        held[own] = held.get(own, 0) + frozen_bytes(shape, setup.device, bf16=bf16)
    inside = _activation_slack(shape, setup.device, work.tokens) * passing_bytes(layers, work.tokens)
    # the head comes after the layers, with their last states still there
    states = beside * layers.compute * shape.hidden * (work.tokens + work.read)
    head = beside * scoring_bytes(shape, work.read, device=setup.device)
    if setup.device == "cpu":
        # A heap keeps what it has had, and later passes cut up the room of the head: measured, it is taken four times.
        most = {"activations": inside, "head": 4 * head}
    else:
        most = {"activations": inside} if inside >= states + head else {"activations": states, "head": head}
    return phase("scoring", {**held, **most}, setup)


def reference_scoring(request: Request) -> list[Phase]:
    """The pass of the reference over pairs, which may share no token; none where it was made before."""
    if "reference_logprobs" in request.wired:
        return []
    scored = request.passes(row=2 * request.longest, rows=request.config.shard_rows)
    weights = {"weights": request.training.state()["weights"]}
    own = None if request.reference_is_policy else "reference"
    reference = request.models.get("reference", request.model)
    return [scoring(reference, request.setup, scored, resident=weights, own=own, bf16=request.config.bf16)]


def frozen_bytes(shape: ModelShape, device: Device, *, bf16: bool) -> float:
    """Of weights that are not trained. They are rounded where they were loaded, so in a CPU's memory there were once
    those in float32."""
    return float(shape.parameters * (2 if bf16 and device == "cuda" else _FLOAT))


def phase(name: str, parts: Mapping[str, float], setup: Setup) -> Phase:
    """With what the process itself holds; parts in their order."""
    return Phase(name, {}).with_parts({**parts, "process": PROCESS_BYTES[setup.device]})


def worst(phases: Sequence[Phase], limit: float) -> Phase:
    """The phase that decides where a process may have so much: the one that is furthest past its room, or the largest
    of the process where all fit."""
    over = [one for one in phases if one.filling(limit) > 1]
    largest = max((one for one in phases if one.room is None), key=lambda one: one.total)
    return max(over, key=lambda one: one.filling(limit), default=largest)


def same_shape(config: Any, models: Mapping[str, ModelShape]) -> dict[str, ModelShape]:
    """`Stage.shapes` of a stage that trains: its model has the shape of input `model`, its adapter is on that."""
    model = models["model"]
    return {
        "model": replace(model, adapters=None),
        "adapter": replace(model, adapters=Adapters.written(config) or model.adapters),
    }
