"""A model in training: the bytes of its weights, gradients and optimizer, however it is spread over processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.sharding import Fsdp, Sharding, Whole, Zero
from stages.training.memory_activations import Layers
from stages.training.memory_adapters import Adapters
from stages.training.memory_allocator import Device
from stages.training.memory_optimizer import OPTIMIZERS, Held, Trained, rounded
from stages.training.memory_shape import ModelShape

_FLOAT = 4
_4BIT = 4.127 / 8
"""Bytes of a weight in 4 bits with quantized constants (arXiv:2305.14314, section 3)."""
_QUANTIZED: Mapping[str, Callable[[int, int], float]] = {
    "nf4": lambda inside, outside: _4BIT * inside * outside,
    "fp4": lambda inside, outside: _4BIT * inside * outside,
    "int8": lambda inside, outside: (inside + _FLOAT) * outside,
}
"""`quantization` -> bytes of a linear part with so many inputs and outputs."""
_ZERO_BUCKET = 500_000_000
"""Elements of DeepSpeed's buffer for gradients on their way, where its configuration does not say."""


@dataclass(frozen=True)
class Setup:
    """Where a stage runs."""

    processes: int = 1
    sharding: Sharding = field(default_factory=Whole)
    device: Device = "cpu"
    device_bytes: int | None = None
    """Memory of one GPU, where the machine has any."""


def averages_beside(config: Any, device: Device) -> int:
    """float32 numbers of a trained weight that a TrainingConfig's averages take in the memory that is trained in."""
    settings = config.weight_averaging
    return 0 if settings is None or (device == "cuda" and settings.device == "cpu") else settings.numbers


@dataclass(frozen=True)
class Training:
    """A model in training: what its settings make of its shape."""

    shape: ModelShape
    setup: Setup
    bf16: bool = False
    adapters: Adapters | None = None
    """None: all weights are trained."""
    gradient_checkpointing: bool = False
    quantization: str | None = None
    """Of the linear parts under adapters."""
    keeps_best: bool = False
    """The weights that were best so far are held besides, in the memory of the host."""
    averages: int = 0
    """float32 numbers of every trained weight that weight_averaging keeps where it trains."""
    optim: str = "adamw"
    pure_bf16: bool = False
    balanced: bool = False
    """With the loss of a mixture's routers."""

    @classmethod
    def of(cls, config: Any, shape: ModelShape, setup: Setup) -> Training:
        """By a TrainingConfig."""
        adapters = Adapters.of(config) or shape.adapters
        keeps_best = getattr(config, "keep", "last") == "best"
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
        return cls(
            shape,
            setup,
            config.bf16,
            adapters,
            config.gradient_checkpointing,
            getattr(config, "quantization", None),
            keeps_best,
            averages_beside(config, setup.device),
            config.optim,
            config.pure_bf16,
            balanced=bool(shape.router_aux_loss_coef if coefficient is None else coefficient) and shape.experts > 0,
        )

    @property
    def layers(self) -> Layers:
        """For the count of activations."""
        rank = None if self.adapters is None else self.adapters.rank
        return Layers(self.shape, self.weight, self.setup.device, rank, self.gradient_checkpointing, self.balanced)

    @property
    def weight(self) -> int:
        """Bytes of a weight in forward passes."""
        return 2 if self.bf16 else _FLOAT

    @property
    def updated(self) -> int:
        """Bytes of a trained weight as the optimizer updates it, and of its gradient."""
        return 2 if self.pure_bf16 else _FLOAT

    @property
    def parameters(self) -> int:
        """All of them, adapters included."""
        return self.shape.parameters + (0 if self.adapters is None else self.trained)

    @property
    def trained(self) -> int:
        """Those that have a gradient."""
        return self.shape.parameters if self.adapters is None else self.shape.adapter_parameters(self.adapters)

    @property
    def optimizer(self) -> Held:
        """Of the whole model."""
        return (rounded if self.pure_bf16 else OPTIMIZERS[self.optim])(
            Trained.of(self.shape, self.adapters), self.setup.device
        )

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

    @property
    def _quantized_shapes(self) -> list[tuple[int, int]]:
        """(in, out) of the linear parts of a layer; experts are stacks, which stay as they are."""
        shapes = [(inside, outside) for inside, outside, _ in self.shape.linear_shapes]
        return shapes[:4] if self.shape.experts else shapes

    @property
    def dequantized(self) -> float:
        """Bytes of the one weight that is had in full for a product: in float32, and in the type of the passes."""
        if self.quantization is None:
            return 0.0
        largest = max(inside * outside for inside, outside in self._quantized_shapes)
        return float(largest * (_FLOAT + (self.weight if self.weight != _FLOAT else 0)))

    @property
    def exported(self) -> float:
        """Bytes of the model in float32 that the adapters of a quantized one are put on in the end, in the memory of
        the host."""
        return 0.0 if self.quantization is None else float(self.parameters * _FLOAT)

    def state(self) -> dict[str, float]:
        """Weights, gradients and optimizer, as the way of sharding spreads them; and averages of weights."""
        n, sharding = self.setup.processes, self.setup.sharding
        averages = self.averages * self.trained * _FLOAT / n  # each process has some of them
        master = _FLOAT if self.bf16 and not self.pure_bf16 else 0
        whole = float(self.parameters * self.weight)
        if self.quantization is not None:
            size = _QUANTIZED[self.quantization]
            saved = sum(self.weight * i * o - size(i, o) for i, o in self._quantized_shapes)
            whole -= self.shape.layers * saved
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
            weights, gradients = whole + self.trained * master, self.trained * self.updated
            n = 1
        state = {"weights": weights, "gradients": gradients, "optimizer": self.optimizer.state / n}
        return state | ({"averages": averages} if averages else {})

    def resident(self) -> dict[str, float]:
        """What stays between steps."""
        return {part: size for part, size in self.state().items() if part != "gradients"}

    def policy_copy(self) -> float:
        """The whole model that a sharded one keeps beside itself, to sample from."""
        return 0.0 if isinstance(self.setup.sharding, Whole) else float(self.parameters * self.weight)

    def _gathered(self) -> float:
        """Embedding, head and final norm, and two layers: one at work, one on its way."""
        outside = self.shape.parameters - self.shape.layers * self.shape.layer_parameters
        return (outside + min(2, self.shape.layers) * self.shape.layer_parameters) * self.weight
