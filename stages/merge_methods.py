"""Ways to make one model of several, by the name that stage `average` has for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from artifacts.errors import StageError
from stages.averaging import Merge, Models
from stages.merging import Differences, Dropped, Thin, Trimmed, added, elected, slerp, threshold, untouched

if TYPE_CHECKING:
    from stages.average import Config

Combine = Callable[[Differences, Sequence[float]], Tensor]
"""(differences, weights) -> what is made of them."""


def weights_of(given: Sequence[float] | None, count: int) -> list[float]:
    """One a model; 1 each where none are given. Raises StageError for another number of them."""
    if given is not None and len(given) != count:
        raise StageError(f"weights has {len(given)} numbers for {count} models")
    return [1.0] * count if given is None else list(given)


def mean(config: Config, models: Models, count: int) -> Merge:
    """The weighted mean."""
    weights = weights_of(config.weights, count)
    shares = [weight / sum(weights) for weight in weights]

    def merge(name: str) -> Tensor:
        total = models.tensor(0, name).double() * shares[0]
        for number, share in enumerate(shares[1:], start=1):
            total += models.tensor(number, name).double() * share
        return total

    return merge


def arc(config: Config, models: Models, count: int) -> Merge:
    """From the first of two models to the second. Raises StageError for another number of them."""
    if count != 2:
        raise StageError(f"method slerp is of two models, and input models has {count}")
    return lambda name: slerp(models.tensor(0, name).double(), models.tensor(1, name).double(), config.t)


def of_differences(
    combine: Combine, thin_of: Callable[[Config, Models, int], Thin]
) -> Callable[[Config, Models, int], Merge]:
    """The base and `scale` times what is made of the models' differences from it."""

    def method(config: Config, models: Models, count: int) -> Merge:
        weights, thin = weights_of(config.weights, count), thin_of(config, models, count)

        def merge(name: str) -> Tensor:
            def differences() -> Iterator[Tensor]:
                return (thin(number, name, models.difference(number, name)) for number in range(count))

            return models.tensor(-1, name).double() + config.scale * combine(differences, weights)

        return merge

    return method


def _whole(config: Config, models: Models, count: int) -> Thin:
    return untouched


def _trimmed(config: Config, models: Models, count: int) -> Thin:
    names = [name for name in models.where[0] if models.tensor(0, name).is_floating_point()]
    density = config.density
    assert density is not None, "the stage's check asks for it"

    def differences(number: int) -> Iterator[Tensor]:
        return (models.difference(number, name) for name in names)

    return Trimmed([threshold(partial(differences, number), density) for number in range(count)])


def _dropped(config: Config, models: Models, count: int) -> Thin:
    assert config.density is not None, "the stage's check asks for it"
    return Dropped(config.density, config.seed)


METHODS: Mapping[str, Callable[[Config, Models, int], Merge]] = {
    "linear": mean,
    "slerp": arc,
    "task_arithmetic": of_differences(added, _whole),
    "ties": of_differences(elected, _trimmed),
    "dare_linear": of_differences(added, _dropped),
    "dare_ties": of_differences(elected, _dropped),
}
"""`method` -> (settings, the models and after them a base where there is one, how many models) -> the merge."""
