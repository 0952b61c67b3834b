"""Tools and environments as a recipe names them."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from stages.rollouts.multi_turn.open_env_settings import OPEN_ENV, OpenEnvParameters
from stages.stage import Arguments, CodeRef, Config, operational


class EnvironmentSpec(Config):
    """An environment with more than a name."""

    name: CodeRef
    """`file.py:name` of a class of your own (or a function that makes one), or openenv: an OpenEnv server."""
    parameters: Arguments = Field(default_factory=dict, validate_default=True)
    """Keyword arguments of your class, or what openenv takes: files and folders that they name count by content,
    relative ones from the recipe; so it is only to read them."""
    url: str | None = operational(None)
    """Where the OpenEnv server is, such as http://127.0.0.1:8000."""
    max_turns: int = Field(16, ge=1)
    """Turns of the model after which an episode ends, if the environment has not ended it."""
    timeout_seconds: float | None = Field(60.0, gt=0)
    """Longest reset or step; null: no limit. A slower one is an error of the environment."""
    on_error: Literal["error", "unscored"] = "error"
    """Where reset or step raises, takes too long or returns something else: the stage ends and names the episode, or
    the episode is left out of learning and counted."""
    max_concurrent: int = operational(64, ge=1)
    """Environments that are at work at once."""

    @model_validator(mode="after")
    def _open_env(self) -> EnvironmentSpec:
        if self.name == OPEN_ENV and self.url is None:
            raise ValueError("environment openenv needs url, where its server is")
        if self.name != OPEN_ENV and self.url is not None:
            raise ValueError(f"url is of environment openenv, found {self.name}")
        return self

    @field_validator("name", mode="after")
    @classmethod
    def _known(cls, name: str) -> str:
        if ":" not in name and name != OPEN_ENV:
            raise ValueError(f"no built-in environment {name!r}; there is {OPEN_ENV}, or give file.py:name")
        return name

    @field_validator("parameters", mode="after")
    @classmethod
    def _complete(cls, parameters: dict[str, Any], info: Any) -> dict[str, Any]:
        """Those of openenv checked and with all defaults, so that they are part of what a result is."""
        if info.data.get("name") != OPEN_ENV:
            return parameters
        try:
            return OpenEnvParameters.model_validate(parameters).model_dump(mode="json")
        except ValidationError as error:
            said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise ValueError(f"parameters of openenv: {said}") from error


Environment = CodeRef | EnvironmentSpec
"""A name alone, or `{name: ..., parameters: {...}}`."""


class MultiTurnConfig(Config):
    """What answers the model, so that a completion has several turns. Their tokens are not trained."""

    tools: tuple[CodeRef, ...] = ()
    """Functions that the model may call, `file.py:name` each; sync or async, described by docstring and type hints. A
    dataset's column `tools` says which of them a row has; without it, all rows have all."""
    max_tool_calling_iterations: int | None = Field(None, ge=1)
    """Turns with calls that are answered; null: as many as max_completion_length has room for."""
    tool_timeout_seconds: float | None = Field(30.0, gt=0)
    """Longest call of a tool; null: no limit. The model is told of a slower one as of any failure."""
    environment: Environment | None = None
    """What answers turns without calls, and may reward them: one instance a completion."""


def environment_of(environment: Environment) -> EnvironmentSpec:
    """With everything said."""
    return EnvironmentSpec.model_validate({"name": environment}) if isinstance(environment, str) else environment


def multi_turn_problems(config: Any, wired: Set[str]) -> list[str]:
    """What is wrong with the tools and the environment of a stage (a `MultiTurnConfig` with rewards)."""
    problems = []
    if config.max_tool_calling_iterations is not None and not config.tools:
        problems.append("max_tool_calling_iterations is given, but there are no tools")
    builtin = [name for name in config.tools if ":" not in name]
    problems += [f"tools names {name!r}, but no tool is built in; give file.py:name" for name in builtin]
    repeated = sorted({name for name in config.tools if config.tools.count(name) > 1})
    problems += [f"tools names {name!r} twice; leave one out" for name in repeated]
    if isinstance(config.environment, str) and ":" not in config.environment:
        problems.append(f"environment {config.environment!r} has no file; give file.py:name, or a mapping for openenv")
    if getattr(config, "structured", None) is not None:
        problems += [
            f"{name} together with structured: a form is of a whole completion, and turns with answers between them "
            "are no form; leave one of the two out"
            for name in ("tools", "environment")
            if getattr(config, name)
        ]
    if "rollouts" in wired:
        given = [name for name in ("tools", "environment") if getattr(config, name)]
        problems += [f"{name} is of sampling; input rollouts is taken as it was recorded" for name in given]
    elif config.environment is None and any(_is_environment(reward) for reward in config.rewards):
        problems.append("rewards names environment, but there is none; give environment: file.py:name")
    return problems


def _is_environment(reward: Any) -> bool:
    return (reward if isinstance(reward, str) else reward.name) == "environment"
