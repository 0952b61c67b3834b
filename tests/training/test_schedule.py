"""The learning rate: values by hand, and those of transformers' schedulers where they know the schedule."""

from __future__ import annotations

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


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("total", [8, 50])
def test_values_of_transformers(total: int, warmup: int) -> None:
    steps: dict[str, Any] = {"num_warmup_steps": warmup, "num_training_steps": total}
    stable = {"num_decay_steps": math.ceil(0.1 * total), "decay_type": "linear"}
    same = [
        ({"lr_scheduler_type": "linear"}, partial(optimization.get_linear_schedule_with_warmup, **steps)),
        ({"lr_scheduler_type": "cosine"}, partial(optimization.get_cosine_schedule_with_warmup, **steps)),
        (
            {"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1},
            partial(optimization.get_cosine_with_min_lr_schedule_with_warmup, **steps, min_lr_rate=0.1),
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_decay_ratio": 0.1},
            partial(optimization.get_wsd_schedule, **steps, **stable),
        ),
    ]
    for settings, make in same:
        assert rates(total, warmup_steps=warmup, **settings) == pytest.approx(theirs(make, total)), settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "give one of them"),
        ({"lr_decay_ratio": 0.3}, "lr_decay_ratio is of lr_scheduler_type warmup_stable_decay, found linear"),
        ({"lr_scheduler_type": "constant", "min_lr_ratio": 0.1}, "which does not fall"),
    ],
)
def test_what_would_not_be_used_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Config.model_validate(settings)
