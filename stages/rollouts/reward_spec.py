"""A reward as a recipe names it, and the built-in ones by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from artifacts.errors import RequestError
from stages.names import nearest
from stages.rollouts.choices import MultipleChoice
from stages.rollouts.code_reward import Code
from stages.rollouts.formats import JsonSchema, RegularExpression, ThinkFormat
from stages.rollouts.judge import Judge
from stages.rollouts.lengths import CosineLength, RepetitionPenalty, SoftOverlong
from stages.rollouts.math_answers import Math
from stages.rollouts.multi_turn.reward import EnvironmentReward
from stages.rollouts.reward_base import BuiltIn
from stages.rollouts.verdicts import ExactMatch, NumericMatch
from stages.stage import Arguments, CodeRef, Config, operational

REWARDS: dict[str, type[BuiltIn]] = {
    "exact_match": ExactMatch,
    "numeric_match": NumericMatch,
    "math": Math,
    "multiple_choice": MultipleChoice,
    "think_format": ThinkFormat,
    "regular_expression": RegularExpression,
    "json_schema": JsonSchema,
    "cosine_length": CosineLength,
    "soft_overlong": SoftOverlong,
    "repetition_penalty": RepetitionPenalty,
    "code": Code,
    "judge": Judge,
    "environment": EnvironmentReward,
}
"""Built-in rewards by name."""

FOREIGN = {
    "accuracy_reward": "math",
    "reasoning_accuracy_reward": "math with parameters: {after: </think>}",
    "think_format_reward": "think_format",
    "get_cosine_scaled_reward": "cosine_length",
    "get_repetition_penalty_reward": "repetition_penalty",
    "get_soft_overlong_punishment": "soft_overlong",
}
"""TRL's name of a reward -> ours."""


class RewardSpec(Config):
    """A reward with more than a name."""

    name: CodeRef
    """A built-in name, or `file.py:name` of your own."""
    parameters: Arguments = Field(default_factory=dict, validate_default=True)
    """What a built-in reward takes, or keyword arguments of your function: files and folders that they name count by
    content, relative ones from the recipe; so it is only to read them."""
    label: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$")
    """Name in metrics and records; null: the function's."""
    timeout_seconds: float | None = Field(None, gt=0)
    """Longest call with all completions of a generation; null: as the reward has it, for most no limit."""
    on_timeout: Literal["error", "none"] = "error"
    """A call that takes longer: an error that names the completion, or None for every completion that alone takes
    longer (then the result depends on the machine)."""
    on_error: Literal["error", "none"] = "error"
    """A function of your own that raises, in each of its tries: an error that names the completion, or None for every
    completion for which it raises alone; how many is a metric and in the log, with the first error."""
    max_tries: int = Field(1, gt=0)
    """Calls of a function of your own with the same arguments, as long as it raises; a slow one is not called again."""
    cache: bool | None = operational(None)
    """Keep results in the store by function, parameters, row and completion; for functions that judge every completion
    by itself. Null: only where the reward asks a server."""

    @field_validator("parameters", mode="after")
    @classmethod
    def _complete(cls, parameters: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Those of a built-in reward checked and with all defaults, so that they are part of what a result is."""
        built_in = REWARDS.get(info.data.get("name", ""))
        if built_in is None:
            return parameters
        return _checked(info.data["name"], built_in, parameters).model_dump(mode="json")

    @model_validator(mode="after")
    def _of_your_own(self) -> Self:
        given = {"on_error": self.on_error != "error", "max_tries": self.max_tries != 1}
        if self.name in REWARDS and any(given.values()):
            fields = " and ".join(name for name, is_given in given.items() if is_given)
            hint = "; its parameters have on_failure and max_tries" if self.name == "judge" else ""
            raise ValueError(f"{fields}: for functions of your own, found the built-in {self.name}{hint}")
        return self

    @property
    def called(self) -> str:
        """The name that it is reported under."""
        return self.label or self.name.rsplit(":", 1)[-1]

    def built_in(self) -> BuiltIn | None:
        """The built-in reward; None: a function of the user."""
        kind = REWARDS.get(self.name)
        return None if kind is None else kind.model_validate(self.parameters)


Reward = CodeRef | RewardSpec
"""A name alone, or `{name: ..., parameters: {...}}`."""


def spec_of(reward: Reward) -> RewardSpec:
    """The reward with everything said. Raises RequestError for a name that is not built in, or needs parameters."""
    if isinstance(reward, str):
        if ":" not in reward and reward not in REWARDS:
            raise RequestError(unknown_reward(reward))
        try:
            return RewardSpec.model_validate({"name": reward})
        except ValidationError as error:
            raise RequestError(f"rewards: {_reasons(error)}: write {{name: {reward}, parameters: {{...}}}}") from error
    if ":" not in reward.name and reward.name not in REWARDS:
        raise RequestError(unknown_reward(reward.name))
    return reward


def usable_specs(rewards: Sequence[Reward]) -> list[RewardSpec]:
    """Without those of which `unknown_rewards` says something."""
    return [spec_of(reward) for reward in rewards if not unknown_rewards([reward])]


def unknown_rewards(rewards: Sequence[Reward]) -> list[str]:
    """What is wrong with the names of rewards; functions in files are checked where paths are resolved."""
    problems = []
    names: list[str] = []
    for reward in rewards:
        try:
            names.append(spec_of(reward).called)
        except RequestError as error:
            problems.append(str(error))
    twice = sorted({name for name in names if names.count(name) > 1})
    return [*problems, *(f"two rewards have the name {name!r}; give one of them a label" for name in twice)]


def unknown_reward(name: str) -> str:
    """What is said of a name that is not built in."""
    hint = f"; here it is {FOREIGN[name]} (TRL)" if name in FOREIGN else nearest(name, REWARDS)
    return f"no built-in reward {name!r}{hint}; there are {', '.join(REWARDS)}, or give file.py:name"


def _checked(name: str, built_in: type[BuiltIn], parameters: Mapping[str, Any]) -> BuiltIn:
    """Strict as a recipe is: "3" is no number. Raises ValueError with every mistake."""
    try:
        return built_in.model_validate_json(json.dumps(parameters), strict=True)
    except ValidationError as error:
        raise ValueError("; ".join(f"{name} {_mistake(entry, built_in)}" for entry in error.errors())) from error


def _mistake(entry: Any, built_in: type[BuiltIn]) -> str:
    place = ".".join(map(str, entry["loc"]))
    describe: dict[str, Callable[[], str]] = {
        "missing": lambda: f"needs {place}",
        "extra_forbidden": lambda: (
            f"has no parameter {place!r}{nearest(place, built_in.model_fields)}; it has "
            f"{', '.join(built_in.model_fields) or 'none'}"
        ),
        "value_error": lambda: str(entry["ctx"]["error"]),
    }
    otherwise = f"parameter {place}: {entry['msg']}, found {entry['input']!r:.80}"
    return describe.get(entry["type"], lambda: otherwise)()


def _reasons(error: ValidationError) -> str:
    return "; ".join(str(entry["ctx"]["error"]) if "ctx" in entry else entry["msg"] for entry in error.errors())
