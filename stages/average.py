"""One model from several of one shape: the weighted mean of their weights, or another merge of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.stage import Config as StageConfig
from stages.stage import Input, Stage
from stages.training.memory_shape import ModelShape

if TYPE_CHECKING:
    from stages.context import Context

_NEGATIVE = ("task_arithmetic", "dare_linear")
"""Methods in which a weight may be negative, to take away what a model has learned."""
_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "linear": ("weights",),
    "slerp": ("t",),
    "task_arithmetic": ("weights", "scale"),
    "ties": ("weights", "scale", "density"),
    "dare_linear": ("weights", "scale", "density", "seed"),
    "dare_ties": ("weights", "scale", "density", "seed"),
}
"""`method` -> the fields that it takes."""


class Config(StageConfig):
    """Settings of the merge."""

    kind: Literal["model", "reward_model"] = "model"
    """What the inputs are, and so the output."""
    method: Literal["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"] = "linear"
    """linear: the weighted mean; slerp: between two models, along an arc; the others work on what the models are away
    from input `base`: task_arithmetic adds it up (arXiv:2212.04089), ties takes the largest of it and the mean over
    those with the weightier sign (arXiv:2306.01708), dare_linear and dare_ties do these with a random part of it
    (arXiv:2311.03099)."""
    weights: tuple[float, ...] | None = None
    """A weight for each of the models, of linear divided by their sum; null: all weigh the same, of the methods with a
    base 1 each."""
    t: float = Field(0.5, ge=0, le=1)
    """How far slerp goes from the first model to the second."""
    scale: float = 1.0
    """What the merged difference is multiplied by before it is added to the base (lambda)."""
    density: float | None = Field(None, gt=0, le=1)
    """Share of a model's differences that is kept: of ties the largest, of dare_linear and dare_ties random ones."""
    seed: int = Field(42, ge=0)
    """Which random ones."""


def run(context: Context) -> None:
    """The merge of input `models`.

    The mean of language models is a soup (Wortsman et al., arXiv:2203.05482); of reward models an ensemble for the
    price of one (Rame et al., arXiv:2401.12187). Configuration, tokenizer and chat template are those of the first.
    """
    from artifacts.errors import StageError
    from stages.averaging import Models, copy_rest, kind_of, merge_folders
    from stages.merge_methods import METHODS

    config: Config = context.config
    folders = context.inputs_of("models")
    base = context.input("base") if context.has("base") else None
    every = [*folders, *([] if base is None else [base])]
    if wrong := [kind for kind in map(kind_of, every) if kind != config.kind]:
        raise StageError(f"an input is a {wrong[0]}; set kind: {wrong[0]} to average several of them")
    context.phase("averaging")
    models = Models.of(folders, base)
    target = context.output(config.kind)
    merge_folders(models, METHODS[config.method](config, models, len(folders)), target)
    copy_rest(folders[0], target)
    context.counts["models"] = len(folders)


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration, and with it and the inputs together."""
    method, taken, fields = config.method, _SETTINGS[config.method], Config.model_fields
    problems = []
    for name in ("weights", "t", "scale", "density", "seed"):
        if name not in taken and getattr(config, name) != fields[name].default:
            owners = ", ".join(one for one, names in _SETTINGS.items() if name in names)
            problems.append(f"{name} is of method {owners}; {method} has none")
    if "density" in taken and config.density is None:
        problems.append(f"method {method} needs density, the share of the differences that it keeps")
    if config.weights is not None and not any(config.weights):
        problems.append("weights are all 0; at least one model must count")
    if method not in _NEGATIVE and any(weight < 0 for weight in config.weights or ()):
        problems.append(f"a weight is below 0; that is of method {', '.join(_NEGATIVE)}, not of {method}")
    return problems + _base_problems(method, "scale" in taken, "base" in wired)


def _base_problems(method: str, is_used: bool, is_there: bool) -> list[str]:
    if is_used and not is_there:
        return [f"method {method} works on what the models are away from a base; wire input base"]
    if is_there and not is_used:
        return [f"input base is wired in, but method {method} has none, so it would not be used"]
    return []


def check_lists(config: Config, counts: Mapping[str, int]) -> list[str]:
    """What is wrong with the number of models and weights."""
    models = counts.get("models", 0)
    if config.method == "slerp" and models not in (0, 2):
        return [f"method slerp is of two models, and input models has {models}"]
    if config.weights is None or not models or len(config.weights) == models:
        return []
    return [f"weights has {len(config.weights)} numbers for {models} models"]


def shapes(config: Config, models: Mapping[str, ModelShape]) -> dict[str, ModelShape]:
    """That of the inputs."""
    return {config.kind: models["models"]} if "models" in models else {}


STAGE = Stage(
    name="average",
    version=1,
    config=Config,
    inputs={
        "models": Input(("model", "reward_model"), many=True),
        "base": Input(("model", "reward_model"), required=False),
    },
    outputs={"model": "model", "reward_model": "reward_model"},
    run=run,
    single=True,
    summary="one model of several: soups, slerp, task arithmetic, TIES, DARE; ensembles of reward models",
    active_outputs=lambda config: (config.kind,),
    check=check,
    check_lists=check_lists,
    shapes=shapes,
)
