"""The arithmetic floor: multiplications that a step cannot do without, over how fast this machine multiplies.

Every distinct prompt once and every completion once go through the layers: one unit forward, two backward. The head
is applied to completion tokens only: logits, gradient of the hidden states, gradient of the weight; once more the
logits where a token's weight in the loss is known only after all logits (DPO). Attention counts exactly the pairs
that a causal mask lets see each other. The last layer counts in full, norms and elementwise work not at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from tests.benchmarks.cases import Architecture, Case, teacher_of
from tests.benchmarks.rows import Row

TRAINING, SCORING = 3, 1
"""Units of the layers."""

RATE_SECONDS = 0.5
"""How long a product is repeated to see how fast it is."""


@dataclass(frozen=True)
class Units:
    """How often a stage's step passes through the parts of a model."""

    layers: int
    head: int
    """Products with the head's matrix for a completion token."""
    teacher: int = 0
    """Forward passes of a teacher, head included."""


UNITS = {
    "sft": Units(TRAINING, 3),
    "reference": Units(SCORING, 1),
    "dpo": Units(TRAINING, 4),
    "reward": Units(TRAINING, 0),
    "grpo": Units(TRAINING, 3),
    "distill": Units(TRAINING, 3, teacher=1),
    "distill_kept": Units(TRAINING, 3 + 1),  # the teacher's head, of as many features
    "online": Units(SCORING + TRAINING, 4),
}


def layer_flops(architecture: Architecture, rows: Sequence[Row]) -> float:
    """Floating-point operations of one forward pass of the rows through the layers, every prompt once."""
    wide, narrow = architecture.heads * architecture.head_dim, architecture.kv_heads * architecture.head_dim
    weights = architecture.hidden * (2 * wide + 2 * narrow + 3 * architecture.intermediate)
    tokens = sum(len(row.prompt) + row.completion_tokens for row in rows)
    # two products, queries with keys and weights with values, of a multiplication and an addition for every element
    attention = 4 * wide * sum(map(_pairs, rows))
    return float(architecture.layers * (2 * weights * tokens + attention))


def _pairs(row: Row) -> int:
    """(query, key) pairs of a row: the prompt among itself, every completion with the prompt and itself."""
    prompt = len(row.prompt)
    return _triangle(prompt) + sum(len(tail) * prompt + _triangle(len(tail)) for tail in row.completions)


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def step_flops(case: Case, rows: Sequence[Row]) -> float:
    """Floating-point operations that a step on these rows takes at least."""
    units, architecture = UNITS[case.stage], case.architecture
    head = 2.0 * architecture.hidden * case.vocabulary * sum(row.completion_tokens for row in rows)
    own = units.layers * layer_flops(architecture, rows) + units.head * head
    if units.teacher == 0:
        return own
    return own + units.teacher * (layer_flops(teacher_of(architecture), rows) + head)


ONEDNN = "oneDNN "
"""Before the shapes that oneDNN multiplied; the others are torch.mm's."""


def measure_rate(case: Case, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Matrix shape -> floating-point operations a second in the case's type, the median over repeated products.

    The shapes are a layer's widest product and a chunk of the head; by torch.mm and, on a CPU, by oneDNN too, which
    torch carries but does not call for them.
    """
    import torch

    from stages.losses.products import linear

    hidden = case.architecture.hidden
    device = "cuda" if torch.cuda.is_available() else "cpu"
    times, kind = (8, torch.bfloat16) if case.bf16 else (1, torch.float32)
    rates = {}
    for m, k, n in [(2048 * times, hidden, case.architecture.intermediate), (256 * times, hidden, case.vocabulary)]:
        left, right, out = (torch.rand(*shape, device=device, dtype=kind) for shape in ((m, k), (k, n), (m, n)))
        shape, flops = f"[{m}, {k}] x [{k}, {n}]", 2.0 * m * k * n
        rates[shape] = flops / _seconds(partial(torch.mm, left, right, out=out), device, clock)
        if device == "cpu" and torch.backends.mkldnn.is_available():
            rates[ONEDNN + shape] = flops / _seconds(partial(linear, left, right.t().contiguous()), device, clock)
    return rates


def _seconds(product: Callable[[], object], device: str, clock: Callable[[], float]) -> float:
    import torch

    taken: list[float] = []
    while len(taken) < 5 or sum(taken) < RATE_SECONDS:
        before = clock()
        product()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(clock() - before)
    return median(taken[1:])
