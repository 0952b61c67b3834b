"""How much memory a stage's process needs at most, and what for: arithmetic on sizes, without torch.

A stage passes through phases (a training step, a pass of its reference, sampling); its peak is that of the largest.
All numbers are bytes of one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stages.sharding import Fsdp, Sharding, Whole, Zero
from stages.training.memory_activations import (
    Layers,
    attention_gradient_bytes,
    passing_bytes,
    saved_bytes,
    stream_bytes,
)
from stages.training.memory_head import HeadUse, held_bytes, scoring_bytes
from stages.training.memory_shape import Adapters, ModelShape

Device = Literal["cpu", "cuda"]

PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "head",
    "reference",
    "sampler",
    "checkpoint",
    "process",
)
"""What memory is for. `weights`: with float32 masters and gathered shards; `reference`: reference, teacher and
reward models; `checkpoint`: the copy that is written while training goes on; `process`: Python and its libraries."""

_FLOAT = 4
_MOMENTS = 2 * _FLOAT
_NF4 = 4.127 / 8
"""Bytes of a weight in 4 bits with quantized constants (arXiv:2305.14314, section 3)."""
PROCESS_BYTES: Mapping[Device, int] = {"cpu": 500_000_000, "cuda": 600_000_000}
"""Resident in a stage's process before it loads a model (CPU), or taken on the GPU by CUDA's context."""
ALLOCATOR_SHARE: Mapping[Device, float] = {"cpu": 0.12, "cuda": 0.05}
"""Of activations and head: what allocators hold beyond what is in use at the peak. On a CPU as measured by
`tests/benchmarks/memory_prediction.py`; on a GPU assumed, not measured."""
_ZERO_BUCKET = 500_000_000
"""Elements of DeepSpeed's buffer for gradients on their way, where its configuration does not say."""


@dataclass(frozen=True)
class Setup:
    """Where a stage runs."""

    processes: int = 1
    sharding: Sharding = field(default_factory=Whole)
    device: Device = "cpu"


@dataclass(frozen=True)
class Request:
    """What a stage is asked to predict its memory for."""

    config: Any
    models: Mapping[str, ModelShape]
    """The model behind every wired input that takes one."""
    wired: frozenset[str]
    """Names of all wired inputs."""
    setup: Setup

    @property
    def model(self) -> ModelShape:
        """Of input `model`."""
        return self.models["model"]

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
        return (
            self.training.adapters is not None
            and "reference" not in self.models
            and isinstance(self.setup.sharding, Whole)
        )

    def frozen(self, *names: str) -> float:
        """Bytes of the models behind those of these inputs that are wired: they stay in float32, whole."""
        return sum(self.models[name].parameters * _FLOAT for name in names if name in self.models)


@dataclass(frozen=True)
class Phase:
    """What is held at once at the worst moment of a part of a stage; only parts that are not zero."""

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts.values())


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


@dataclass(frozen=True)
class Training:
    """A model in training: what its settings make of its shape."""

    shape: ModelShape
    setup: Setup
    bf16: bool = False
    adapters: Adapters | None = None
    """None: all weights are trained."""
    gradient_checkpointing: bool = False
    quantized: bool = False

    @classmethod
    def of(cls, config: Any, shape: ModelShape, setup: Setup) -> Training:
        """By a TrainingConfig."""
        adapters = Adapters.of(config) or shape.adapters
        quantized = getattr(config, "quantization", None) is not None
        return cls(shape, setup, config.bf16, adapters, config.gradient_checkpointing, quantized)

    @property
    def layers(self) -> Layers:
        """For the count of activations."""
        rank = None if self.adapters is None else self.adapters.rank
        return Layers(self.shape, self.weight, self.setup.device, rank, self.gradient_checkpointing)

    @property
    def weight(self) -> int:
        """Bytes of a weight in forward passes."""
        return 2 if self.bf16 else _FLOAT

    @property
    def parameters(self) -> int:
        """All of them, adapters included."""
        return self.shape.parameters + (0 if self.adapters is None else self.trained)

    @property
    def trained(self) -> int:
        """Those that have a gradient."""
        return self.shape.parameters if self.adapters is None else self.shape.adapter_parameters(self.adapters)

    @property
    def trains_head(self) -> bool:
        """Whether the head's weight has a gradient."""
        named = () if self.adapters is None else (*(self.adapters.targets or ()), *self.adapters.saved)
        return self.adapters is None or "lm_head" in named

    @property
    def widened_head(self) -> int:
        """Bytes of the head's weight beside that of its adapter, which a pass puts together."""
        if self.adapters is None or "lm_head" not in (self.adapters.targets or ()):
            return 0
        return self.weight * self.shape.vocabulary * (self.shape.hidden + self.adapters.rank)

    def state(self) -> dict[str, float]:
        """Weights, gradients and optimizer, as the way of sharding spreads them."""
        n, sharding = self.setup.processes, self.setup.sharding
        master = _FLOAT if self.bf16 else 0
        whole = float(self.parameters * self.weight)
        if self.quantized:
            linear = self.shape.layers * sum(inside * outside for inside, outside, _ in self.shape.linear_shapes)
            whole -= linear * (self.weight - _NF4)
        if isinstance(sharding, Fsdp):
            # float32 slices; what is gathered is in the type of the passes
            weights = self.parameters * _FLOAT / n + self._gathered()
            gradients = self.trained * _FLOAT / n + self.shape.layer_parameters * _FLOAT
        elif isinstance(sharding, Zero):
            sliced = sharding.stage == 3
            weights = (whole / n + self._gathered() if sliced else whole) + self.trained * _FLOAT / n
            bucket = float(sharding.options.get("reduce_bucket_size", _ZERO_BUCKET))
            # memory of a CPU counts once it is written to
            used = min(bucket, self.trained) if self.setup.device == "cpu" else bucket
            gradients = self.trained * _FLOAT / (1 if sharding.stage == 1 else n) + used * self.weight
        else:
            weights, gradients = whole + self.trained * master, self.trained * _FLOAT
            n = 1
        return {"weights": weights, "gradients": gradients, "optimizer": self.trained * _MOMENTS / n}

    def policy_copy(self) -> float:
        """The whole model that a sharded one keeps beside itself, to sample from."""
        return 0.0 if isinstance(self.setup.sharding, Whole) else float(self.parameters * self.weight)

    def _gathered(self) -> float:
        """Embedding, head and final norm, and two layers: one at work, one on its way."""
        outside = self.shape.parameters - self.shape.layers * self.shape.layer_parameters
        return (outside + min(2, self.shape.layers) * self.shape.layer_parameters) * self.weight


def training_step(training: Training, work: Passes, use: HeadUse, *, reference: float = 0) -> Phase:
    """A step, once the optimizer has its state. `reference`: other models that stay.

    The worst moment is one of three: in the head, with the activations of all layers; in the backward pass of the last
    attention; at the end, with all gradients and, in a later pass of the step, a second one of the embedding.
    """
    shape, setup, layers = training.shape, training.setup, training.layers
    state = training.state()
    head = held_bytes(
        shape, use, work.read, device=setup.device, compute=training.weight, frozen=not training.trains_head
    )
    head += training.widened_head
    saved = saved_bytes(layers, work.tokens, work.read, work.longest)
    slack = 1 + ALLOCATOR_SHARE[setup.device]
    streams = stream_bytes(layers, work.tokens)
    before = state["gradients"] if work.count > 1 else 0.0
    embedding = shape.embedding_parameters * _FLOAT if layers.all_trained else 0
    moments = [
        {"gradients": before, "activations": slack * (saved + streams), "head": slack * head},
        {
            "gradients": before,
            "activations": slack * (saved + streams + attention_gradient_bytes(layers, work.tokens, work.read)),
            "head": 0.0 if shape.classifier else slack * embedding,
        },
        {"gradients": state["gradients"] + (embedding if work.count > 1 else 0), "activations": slack * streams},
    ]
    worst = max(moments, key=lambda parts: sum(parts.values()))
    copy = training.trained * (_FLOAT + _MOMENTS) / setup.processes if setup.device == "cpu" else 0
    return phase("training step", {**state, **worst, "checkpoint": copy, "reference": reference}, setup)


def scoring(
    shape: ModelShape,
    setup: Setup,
    work: Passes,
    *,
    resident: Mapping[str, float] | None = None,
    own: str | None = "weights",
    bf16: bool = False,
) -> Phase:
    """A pass without gradients beside what is `resident`. `own`: the part that the model's own float32 weights go to;
    None: they are among what is resident."""
    layers = Layers(shape, 2 if bf16 else _FLOAT, setup.device)
    slack = 1 + ALLOCATOR_SHARE[setup.device]
    held = dict(resident or {})
    if own is not None:
        held[own] = held.get(own, 0) + shape.parameters * _FLOAT
    inside = slack * passing_bytes(layers, work.tokens)
    # the head comes after the layers, with their last states still there
    states = slack * layers.compute * shape.hidden * (work.tokens + work.read)
    head = slack * scoring_bytes(shape, work.read, device=setup.device)
    if setup.device == "cpu":
        # A heap keeps what it has had, and later passes cut up the room of the head: measured, it is taken three times.
        most = {"activations": inside, "head": 3 * head}
    else:
        most = {"activations": inside} if inside >= states + head else {"activations": states, "head": head}
    return phase("scoring", {**held, **most}, setup)


def phase(name: str, parts: Mapping[str, float], setup: Setup) -> Phase:
    """With what the process itself holds; parts in their order."""
    known = {**parts, "process": PROCESS_BYTES[setup.device]}
    return Phase(name, {part: float(known[part]) for part in PARTS if known.get(part)})


def worst(phases: Sequence[Phase]) -> Phase:
    """The phase that decides."""
    return max(phases, key=lambda one: one.total)


def same_shape(config: Any, models: Mapping[str, ModelShape]) -> dict[str, ModelShape]:
    """`Stage.shapes` of a stage that trains: its model has the shape of input `model`, its adapter is on that."""
    model = models["model"]
    return {
        "model": replace(model, adapters=None),
        "adapter": replace(model, adapters=Adapters.of(config) or model.adapters),
    }
