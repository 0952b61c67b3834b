"""One model from several of one shape: the weighted mean of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.stage import Config as StageConfig
from stages.stage import Input, Stage
from stages.training.memory_shape import ModelShape

if TYPE_CHECKING:
    from stages.context import Context

Weight = Annotated[float, Field(ge=0)]


class Config(StageConfig):
    """Settings of the mean."""

    kind: Literal["model", "reward_model"] = "model"
    """What the inputs are, and so the output."""
    weights: tuple[Weight, ...] | None = None
    """A weight for each of the models, divided by their sum; null: all weigh the same."""


def run(context: Context) -> None:
    """The mean of input `models`.

    Of language models a soup (Wortsman et al., arXiv:2203.05482); of reward models an ensemble for the price of one
    (Rame et al., arXiv:2401.12187). Configuration, tokenizer and chat template are those of the first.
    """
    from artifacts.errors import StageError
    from stages.averaging import average_folders, copy_rest, kind_of, shares_of

    config: Config = context.config
    folders = context.inputs_of("models")
    if wrong := [kind for kind in map(kind_of, folders) if kind != config.kind]:
        raise StageError(f"an input is a {wrong[0]}; set kind: {wrong[0]} to average several of them")
    shares = shares_of(config.weights, len(folders))
    context.phase("averaging")
    target = context.output(config.kind)
    average_folders(folders, shares, target)
    copy_rest(folders[0], target)
    context.counts["models"] = len(folders)


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration."""
    if config.weights is not None and not any(config.weights):
        return ["weights are all 0; at least one model must count"]
    return []


def shapes(config: Config, models: Mapping[str, ModelShape]) -> dict[str, ModelShape]:
    """That of the inputs."""
    return {config.kind: models["models"]} if "models" in models else {}


STAGE = Stage(
    name="average",
    version=1,
    config=Config,
    inputs={"models": Input(("model", "reward_model"), many=True)},
    outputs={"model": "model", "reward_model": "reward_model"},
    run=run,
    single=True,
    summary="the mean of several models: soups, ensembles of reward models",
    active_outputs=lambda config: (config.kind,),
    check=check,
    shapes=shapes,
)
