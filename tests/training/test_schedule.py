"""The learning rate: values by hand, and those of transformers' schedulers where they know the schedule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import optimization

from stages.sft import Config
from stages.training.schedule import Schedule


def rates(total: int, **settings: Any) -> list[float]:
    """What a stage with these settings multiplies learning_rate by, step by step."""
    schedule = Schedule.of(Config.model_validate(settings))
    return [schedule.factor(step, total) for step in range(total)]


BY_HAND = [
    ({}, [1, 0.8, 0.6, 0.4, 0.2]),
    ({"warmup_steps": 2}, [0, 0.5, 1, 2 / 3, 1 / 3]),
    ({"warmup_ratio": 0.4}, [0, 0.5, 1, 2 / 3, 1 / 3]),
    ({"warmup_ratio": 0.3}, [0, 0.5, 1, 2 / 3, 1 / 3]),  # 1.5 steps are 2
    ({"warmup_steps": 9}, [0, 0.2, 0.4, 0.6, 0.8]),  # more than there are
    ({"min_lr_ratio": 0.5}, [1, 0.9, 0.8, 0.7, 0.6]),
    ({"min_lr_ratio": 0.5, "warmup_steps": 1}, [0, 1, 0.875, 0.75, 0.625]),
    ({"lr_scheduler_type": "constant", "warmup_steps": 1}, [0, 1, 1, 1, 1]),
    ({"lr_scheduler_type": "warmup_stable_decay", "lr_decay_ratio": 0.4}, [1, 1, 1, 1, 0.5]),
    ({"lr_scheduler_type": "warmup_stable_decay", "lr_decay_ratio": 0.5}, [1, 1, 1, 2 / 3, 1 / 3]),
    ({"lr_scheduler_type": "warmup_stable_decay", "lr_decay_ratio": 1, "warmup_steps": 3}, [0, 1 / 3, 2 / 3, 1, 0.5]),
    ({"lr_scheduler_type": "polynomial", "lr_power": 2}, [1, 0.64, 0.36, 0.16, 0.04]),
    ({"lr_scheduler_type": "polynomial", "lr_power": 2, "min_lr_ratio": 0.5}, [1, 0.82, 0.68, 0.58, 0.52]),
    ({"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 1}, [0, 1, 2**-0.5, 3**-0.5, 0.5]),
    ({"lr_scheduler_type": "inverse_sqrt", "lr_timescale": 2}, [1, 1.5**-0.5, 2**-0.5, 2.5**-0.5, 3**-0.5]),
    ({"lr_scheduler_type": "cosine_with_restarts", "lr_num_cycles": 2, "warmup_steps": 1}, [0, 1, 0.5, 1, 0.5]),
    (
        {"lr_scheduler_type": "cosine_with_restarts", "lr_num_cycles": 2, "warmup_steps": 1, "min_lr_ratio": 0.2},
        [0, 1, 0.6, 1, 0.6],
    ),
    (
        {"lr_scheduler_type": "warmup_stable_decay", "lr_decay_ratio": 0.8, "lr_decay_type": "1-sqrt"},
        [1, 1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5],
    ),
    (
        {"lr_scheduler_type": "warmup_stable_decay", "lr_decay_ratio": 0.8, "lr_decay_type": "cosine"},
        [1, 1, 0.5 + 8**-0.5, 0.5, 0.5 - 8**-0.5],
    ),
    (
        {"lr_scheduler_type": "cosine", "min_lr_ratio": 0.2},
        [0.6 + 0.4 * math.cos(step * math.pi / 5) for step in range(5)],
    ),
]


@pytest.mark.parametrize(("settings", "expected"), BY_HAND)
def test_values_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    assert rates(5, **settings) == pytest.approx(expected)


def theirs(make: Callable[[torch.optim.Optimizer], Any], total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(total):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


Settings = dict[str, Any]
THEIRS: list[tuple[Settings, Any, Settings]] = [
    ({"lr_scheduler_type": "linear"}, optimization.get_linear_schedule_with_warmup, {}),
    ({"lr_scheduler_type": "cosine"}, optimization.get_cosine_schedule_with_warmup, {}),
    (
        {"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1},
        optimization.get_cosine_with_min_lr_schedule_with_warmup,
        {"min_lr_rate": 0.1},
    ),
    *(
        (
            {"lr_scheduler_type": "cosine_with_restarts", "lr_num_cycles": cycles},
            optimization.get_cosine_with_hard_restarts_schedule_with_warmup,
            {"num_cycles": cycles},
        )
        for cycles in (1, 2, 3)
    ),
    *(
        (
            {"lr_scheduler_type": "polynomial", "lr_power": power, "min_lr_ratio": end},
            optimization.get_polynomial_decay_schedule_with_warmup,
            {"power": power, "lr_end": end},
        )
        for power, end in ((1.0, 0.0), (2.0, 0.1), (0.5, 1e-7))
    ),
    ({"lr_scheduler_type": "inverse_sqrt"}, optimization.get_inverse_sqrt_schedule, {}),
    (
        {"lr_scheduler_type": "inverse_sqrt", "lr_timescale": 9},
        optimization.get_inverse_sqrt_schedule,
        {"timescale": 9},
    ),
    ({"lr_scheduler_type": "constant"}, optimization.get_constant_schedule_with_warmup, {}),
    *(
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_decay_ratio": 0.1, "lr_decay_type": decay},
            optimization.get_wsd_schedule,
            {"decay_type": decay},
        )
        for decay in ("linear", "cosine", "1-sqrt")
    ),
]
"""Settings, transformers' schedule, and its arguments."""


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("total", [8, 50])
@pytest.mark.parametrize(("settings", "schedule", "arguments"), THEIRS)
def test_values_of_transformers(
    settings: Settings, schedule: Any, arguments: Settings, total: int, warmup: int
) -> None:
    known = {
        "num_warmup_steps": warmup,
        "num_training_steps": total,
        "num_decay_steps": math.ceil(0.1 * total),
    }
    taken = {name: value for name, value in known.items() if name in inspect.signature(schedule).parameters}
    expected = theirs(partial(schedule, **taken, **arguments), total)
    assert rates(total, warmup_steps=warmup, **settings) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_floor_of_the_stable_schedule_is_transformers_without_warmup() -> None:
    """Theirs would warm up from the floor."""
    settings = {"lr_scheduler_type": "warmup_stable_decay", "min_lr_ratio": 0.2, "lr_decay_type": "1-sqrt"}
    arguments = {"num_warmup_steps": 0, "num_decay_steps": 10, "num_training_steps": 50, "decay_type": "1-sqrt"}
    expected = theirs(partial(optimization.get_wsd_schedule, **arguments, min_lr_ratio=0.2), 50)
    assert rates(50, **settings) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "give one of them"),
        ({"lr_decay_ratio": 0.3}, "lr_decay_ratio is of lr_scheduler_type warmup_stable_decay, found linear"),
        ({"lr_scheduler_type": "constant", "min_lr_ratio": 0.1}, "is constant, whose fall has no such end"),
        ({"lr_scheduler_type": "inverse_sqrt", "min_lr_ratio": 0.1}, "is inverse_sqrt, whose fall has no such end"),
        ({"lr_decay_type": "cosine"}, "lr_decay_type is of lr_scheduler_type warmup_stable_decay, found linear"),
        ({"lr_num_cycles": 2}, "lr_num_cycles is of lr_scheduler_type cosine_with_restarts, found linear"),
        ({"lr_scheduler_type": "cosine", "lr_power": 2}, "lr_power is of lr_scheduler_type polynomial, found cosine"),
        ({"lr_timescale": 5}, "lr_timescale is of lr_scheduler_type inverse_sqrt, found linear"),
    ],
)
def test_what_would_not_be_used_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Config.model_validate(settings)
