"""What optimizers hold: the state of all trained tensors, and what the update of the largest one takes meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stages.training.memory_adapters import Adapters
from stages.training.memory_allocator import Device
from stages.training.memory_shape import ModelShape

_FLOAT = 4
_CHUNK = 2**22
"""`rounded_adamw.CHUNK`."""
_8BIT = 1 + _FLOAT / 256
"""Bytes of a moment in 8 bits, with its share of a scale (arXiv:2110.02861)."""


@dataclass(frozen=True)
class Trained:
    """Numbers of elements that are trained: in all, and of the matrices of layers."""

    all: int
    matrices: int
    sides: int
    """Rows and columns of all matrices, and every element that is in none: what is kept of second moments by rows and
    columns."""
    largest: int
    """The largest tensor."""
    largest_matrix: int
    """The largest matrix of a layer, or stack of its experts' matrices."""

    @classmethod
    def of(cls, shape: ModelShape, adapters: Adapters | None) -> Trained:
        """A model, or its adapters and what is trained whole beside them."""
        if adapters is not None:
            trained = shape.adapter_parameters(adapters)
            widest = adapters.rank * max(inside + outside for inside, outside, _ in shape.linear_shapes)
            # one of a matrix's sides is the rank
            return cls(trained, trained, trained // adapters.rank, widest, widest)
        tensors = _matrices(shape)
        matrices = sum(n * rows * columns for n, rows, columns in tensors)
        sides = sum(n * (rows + columns) for n, rows, columns in tensors)
        stack = max(n * rows * columns for n, rows, columns in tensors)
        vectors = shape.layers * (shape.layer_parameters - matrices) + shape.hidden
        outside = shape.parameters - shape.layers * matrices - vectors
        tables = outside // shape.hidden + (1 if shape.tied or shape.classifier else 2) * shape.hidden
        return cls(
            all=shape.parameters,
            matrices=shape.layers * matrices,
            sides=shape.layers * sides + vectors + tables,
            largest=max(stack, shape.embedding_parameters),
            largest_matrix=stack,
        )


def _matrices(shape: ModelShape) -> list[tuple[int, int, int]]:
    """(how many in one tensor, rows, columns) of a layer."""
    linear = [(1, outside, inside) for inside, outside, _ in shape.linear_shapes]
    if not shape.experts:
        return linear
    n, hidden, inner = shape.experts, shape.hidden, shape.intermediate
    # the router; and of all experts gate with up, and down
    return [*linear[:4], (1, n, hidden), (n, 2 * inner, hidden), (n, hidden, inner)]


@dataclass(frozen=True)
class Held:
    """Bytes."""

    state: float
    update: float = 0.0
    """Beside the state, the weights and the gradients, while one tensor is updated."""


def _adamw_8bit(trained: Trained, device: Device) -> Held:
    state = 2 * _8BIT * trained.matrices + 2 * _FLOAT * (trained.all - trained.matrices)
    # a CPU puts both moments into float32 on the way, measured
    return Held(state, 5 * _FLOAT * trained.largest_matrix if device == "cpu" else 0)


def _muon(trained: Trained, device: Device) -> Held:
    state = _FLOAT * trained.matrices + 2 * _FLOAT * (trained.all - trained.matrices)
    # the momentum ahead, two matrices of the iteration, and two of its inner products
    return Held(state, 5 * _FLOAT * trained.largest_matrix)


def rounded(trained: Trained, device: Device) -> Held:
    """`pure_bf16`: two moments in bfloat16; of a part of a tensor, weight, moments, gradient, their size and a sum in
    float32, what is random, what is rounded, and where it is finite."""
    return Held(4.0 * trained.all, 8 * _FLOAT * min(_CHUNK, trained.largest))


OPTIMIZERS: Mapping[str, Callable[[Trained, Device], Held]] = {
    "adamw": lambda trained, device: Held(2 * _FLOAT * trained.all),
    "adamw_8bit": _adamw_8bit,
    # squares, the estimate of their mean, and the update
    "adafactor": lambda trained, device: Held(_FLOAT * trained.sides, 3 * _FLOAT * trained.largest),
    "muon": _muon,
}
"""`optim` -> what it holds."""
