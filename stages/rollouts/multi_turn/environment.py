"""Environments: what answers the turns of a model, and may reward them.

An environment is a class of the user (or a function that makes one), whose methods may be async:

    reset(row)   -> observation | None         once, with the dataset's row; joins the prompt's last user message
    step(action) -> observation, reward, done  the text of a turn; reward may be None
    close()                                    if there is one, at the end

One instance serves one completion. All completions of a prompt are compared, so `reset` must give them the same
observation: let it follow from the row.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from artifacts.errors import StageError
from stages.external import load_named
from stages.rollouts.multi_turn.settings import EnvironmentSpec

Stepped = tuple[str, float | None, bool]
"""observation, reward, done"""


class Environment(Protocol):
    """The rules of one episode."""

    def reset(self, row: dict[str, Any]) -> Any:
        """What the model sees at first, beside the prompt; None: nothing."""
        ...

    def step(self, action: str) -> Any:
        """(observation, reward, whether the episode is over) for a turn of the model."""
        ...


class Make(Protocol):
    """Makes the environment of one completion."""

    def __call__(self) -> Environment: ...


class WrongAnswerError(Exception):
    """An environment returned something else than it should."""


def maker_of(spec: EnvironmentSpec) -> Make:
    """What makes the environments of a stage. Raises StageError where it cannot be loaded, or lacks a method."""
    if spec.url is not None:
        from stages.rollouts.multi_turn.open_env import OpenEnvServer

        return OpenEnvServer.of(spec.url, spec.parameters, spec.timeout_seconds).session
    made: Callable[..., Any] = load_named("environment", spec.name)
    if inspect.isclass(made):
        missing = [name for name in ("reset", "step") if not callable(getattr(made, name, None))]
        if missing:
            raise StageError(
                f"environment {spec.name} has no method {' and no method '.join(missing)}; it needs reset(row) and "
                "step(action)"
            )
    return partial(made, **spec.parameters)


def observed(value: Any) -> str | None:
    """What `reset` gave. Raises WrongAnswerError where that is no text."""
    if value is None or isinstance(value, str):
        return value
    raise WrongAnswerError(f"reset returned {value!r:.100}; give the observation as text, or None")


def stepped(value: Any) -> Stepped:
    """What `step` gave. Raises WrongAnswerError for anything but (text, number or None, true or false)."""
    expected = "give (observation: text, reward: a finite number or None, done: true or false)"
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise WrongAnswerError(f"step returned {value!r:.100}; {expected}")
    observation, reward, done = value
    if observation is None and done:
        observation = ""
    number = None if reward is None else _number(reward)
    if not isinstance(observation, str) or not isinstance(done, bool | int) or (reward is not None and number is None):
        raise WrongAnswerError(f"step returned {value!r:.100}; {expected}")
    return observation, number, bool(done)


def _number(value: Any) -> float | None:
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
