"""A model goes on only if its evaluation is no worse than another one's, or than what is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.evaluation.scores import REWARD_MEAN
from stages.names import nearest
from stages.stage import MODELS, Input, Stage
from stages.stage import Config as StageConfig
from stages.training.memory_shape import ModelShape

if TYPE_CHECKING:
    from stages.context import Context

Tolerance = Annotated[float, Field(ge=0)]

METRICS = ("accuracy", "reward", "preference/accuracy", "preference/margin", "loss", "completions/clipped_ratio")
"""Metrics of `evaluate` that have a better and a worse; so have `rewards/mean` and `rewards/NAME/mean`."""


class Config(StageConfig):
    """What decides."""

    kind: Literal["model", "adapter", "reward_model"] = "model"
    """What input `model` is, and so the output that hands it on."""
    metrics: dict[str, Tolerance] = Field(default={})
    """Metric -> how much worse than the baseline the candidate may be, in the metric's own unit (`{accuracy: 0.01}`:
    one of a hundred); of `if_better`, by more than how much it must be better."""
    limits: dict[str, float] = Field(default={})
    """Metric -> the value that the candidate itself must come to: at least this, or at most, of a loss."""
    passes: Literal["unless_worse", "if_not_worse", "if_better"] = "unless_worse"
    """unless_worse: stops what is shown to be worse by more than is tolerated. if_not_worse: lets through what is
    shown to be no worse than is tolerated, so that too few rows let nothing through. if_better: what is shown to be
    better. Where nothing is tolerated the tests are exact for any number of rows."""
    level: float = Field(0.05, gt=0, lt=0.5)
    """Chance that it is wrong: to stop an equally good candidate (unless_worse; of all metrics together), or to let
    through one that is worse by what is tolerated, or better by no more than it must be."""
    max_unpaired: float = Field(0.0, ge=0, lt=1)
    """Share of the rows that only one of the two evaluations may have; they do not count."""
    draws: int = Field(10_000, ge=1000)
    """Random exchanges of the randomization test."""
    seed: int = 0
    """Seed of the exchanges, and of the bootstrap."""


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration and the inputs together."""
    problems = [
        f"{field}: {name!r} is no metric that can be better or worse{nearest(name, METRICS)}; there are: "
        f"{', '.join(METRICS)}, rewards/mean, rewards/NAME/mean"
        for field, names in (("metrics", config.metrics), ("limits", config.limits))
        for name in names
        if name not in METRICS and not REWARD_MEAN.fullmatch(name)
    ]
    if not config.metrics and not config.limits:
        problems.append("nothing is asked: give metrics (against input baseline), limits, or both")
    if config.metrics and "baseline" not in wired:
        problems.append("metrics are compared with input baseline, which is not wired in; limits need none")
    if "baseline" in wired and not config.metrics:
        problems.append("input baseline is wired in, but metrics names none, so it would not be used")
    tests = len(config.metrics) if config.passes == "unless_worse" else 1
    if config.metrics and config.level / tests < (least := 1 / (config.draws + 1)):
        problems.append(
            f"level {config.level:g} over {tests} tests cannot be reached with {config.draws} draws, whose smallest p "
            f"is {least:.2g}: give draws: {math.ceil(10 * tests / config.level)}, or a larger level"
        )
    if config.passes == "if_not_worse" and (exact := [name for name, most in config.metrics.items() if most == 0]):
        problems.append(
            f"if_not_worse cannot be shown where nothing is tolerated; give metrics.{exact[0]} a number above 0, or "
            "take unless_worse or if_better"
        )
    return problems


def run(context: Context) -> None:
    """Compare input `candidate`, an evaluation of input `model`, with input `baseline`; hand the model on, or stop."""
    from stages.evaluation.gating import decide

    decide(context)


def shapes(config: Config, models: Mapping[str, ModelShape]) -> dict[str, ModelShape]:
    """That of the input."""
    return {config.kind: models["model"]} if "model" in models else {}


STAGE = Stage(
    name="gate",
    version=1,
    config=Config,
    inputs={
        "model": Input((*MODELS, "reward_model")),
        "candidate": Input(("evaluation",)),
        "baseline": Input(("evaluation",), required=False),
    },
    outputs={
        "model": "model",
        "adapter": "adapter",
        "reward_model": "reward_model",
        "evaluation": "evaluation",
        "verdict": "verdict",
    },
    active_outputs=lambda config: (config.kind, "evaluation", "verdict"),
    run=run,
    single=True,
    summary="a model goes on only if its evaluation is no worse than another's, by a test over the same rows",
    check=check,
    main_metric="difference",
    shapes=shapes,
)
