"""Merges of models, tensor by tensor, as functions of float64 tensors.

tau_i is what model i is away from a base, w_i its weight. Tensors are read when they are asked for, more than once
where that spares holding those of all models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.seeds import generator

_PARALLEL = 0.9995
"""Cosine from which on two directions are one, and a straight line is taken."""
_HALF = 16
"""Bits of a float32 that are counted at a time."""

Differences = Callable[[], Iterator[Tensor]]
"""Gives tau_1, tau_2, ... of one tensor, anew at every call."""
Thin = Callable[[int, str, Tensor], Tensor]
"""(number of the model, name of the tensor, tau) -> what is left of tau."""


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """From the `first` at t = 0 to the `second` at t = 1 along the arc between their directions (Shoemake, SIGGRAPH
    1985): sin((1 - t) a) / sin a first + sin(t a) / sin a second, a being their angle as flat vectors.

    Where they point the same way, opposite ways or nowhere there is no such arc: then along the line.
    """
    lengths = first.norm() * second.norm()
    cosine = float((first.flatten() @ second.flatten()) / lengths) if lengths > 0 else 1.0
    if abs(cosine) > _PARALLEL:
        return (1 - t) * first + t * second
    angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
    parts = torch.sin((1 - t) * angle), torch.sin(t * angle)
    return (parts[0] * first + parts[1] * second) / torch.sin(angle)


def added(differences: Differences, weights: Sequence[float]) -> Tensor:
    """The sum of w_i tau_i (task arithmetic, Ilharco et al., arXiv:2212.04089, section 2)."""
    return _sum(weight * tau for weight, tau in zip(weights, differences(), strict=True))


def elected(differences: Differences, weights: Sequence[float]) -> Tensor:
    """Every element's mean over the models that have the sign which weighs more, by their weights (TIES, Yadav et al.,
    arXiv:2306.01708, steps 2 and 3). Where both signs weigh the same, and where all are zero, it is zero."""
    sign = added(differences, weights).sign()
    over, under = torch.zeros_like(sign), torch.zeros_like(sign)
    for weight, tau in zip(weights, differences(), strict=True):
        agree = (tau.sign() == sign) & (sign != 0)
        over += weight * tau * agree
        under += weight * agree
    return over / torch.where(under == 0, 1.0, under)


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    found = iter(tensors)
    total = next(found)
    for tensor in found:
        total = total + tensor
    return total


def untouched(number: int, name: str, tau: Tensor) -> Tensor:
    """A `Thin` that takes nothing away."""
    return tau


@dataclass(frozen=True)
class Threshold:
    """Where the largest elements of a model end."""

    magnitude: float
    """Larger ones are kept; a float32."""
    share: float
    """Of elements of just this size, how many are: in bfloat16 there are many."""


@dataclass(frozen=True)
class Trimmed:
    """A `Thin`: all but the largest elements of a model become zero (TIES, step 1); among those of the threshold's own
    size a draw decides, the same whatever file a tensor is in."""

    thresholds: Sequence[Threshold]

    def __call__(self, number: int, name: str, tau: Tensor) -> Tensor:
        threshold, sizes = self.thresholds[number], tau.abs().float()
        kept = sizes > threshold.magnitude
        if bool((at := sizes == threshold.magnitude).any()):
            drawn = torch.from_numpy(generator(0, "ties", number, name).random(tuple(tau.shape)))
            kept |= at & (drawn < threshold.share)
        return tau * kept


@dataclass(frozen=True)
class Dropped:
    """A `Thin`: elements become zero at random, each with probability 1 - density, and the others are divided by
    density, so that the expected value stays (DARE, Yu et al., arXiv:2311.03099, section 3.2)."""

    density: float
    seed: int

    def __call__(self, number: int, name: str, tau: Tensor) -> Tensor:
        drawn = torch.from_numpy(generator(self.seed, "dare", number, name).random(tuple(tau.shape)))
        return tau * (drawn < self.density) / self.density


def threshold(tensors: Callable[[], Iterator[Tensor]], density: float) -> Threshold:
    """Where this share of all elements of the tensors ends: TIES keeps the largest of a model, not of each tensor.
    Exact: by counting the first half of the bits of magnitudes, then the second half among those that share the
    first."""
    if density == 1:
        return Threshold(0.0, 1.0)
    counts = torch.zeros(2**_HALF, dtype=torch.int64)
    for bits in _magnitudes(tensors()):
        counts += torch.bincount(bits >> _HALF, minlength=2**_HALF)
    wanted = max(1, round(density * int(counts.sum())))
    first, rest = _largest(counts, wanted)
    counts.zero_()
    for bits in _magnitudes(tensors()):
        counts += torch.bincount(bits[bits >> _HALF == first] & (2**_HALF - 1), minlength=2**_HALF)
    second, left = _largest(counts, rest)
    magnitude = float(torch.tensor((first << _HALF) + second, dtype=torch.int32).view(torch.float32))
    return Threshold(magnitude, left / int(counts[second]))


def _magnitudes(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Their bits as whole numbers, which are in the order of the numbers that they stand for."""
    return (tensor.abs().float().flatten().view(torch.int32) for tensor in tensors)


def _largest(counts: Tensor, wanted: int) -> tuple[int, int]:
    """(the bin of the `wanted`-th largest, which of that bin's largest it is)."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, torch.tensor(wanted)))
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, wanted - before
